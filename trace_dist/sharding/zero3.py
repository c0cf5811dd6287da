"""Backend ``zero3``: DeepSpeed ZeRO-3 partitions the parameters; updates happen inside each rank's partition.

DeepSpeed is initialised *without an optimizer*: it then builds only its parameter partitioning and its fetch, prefetch and
release hooks, no fp32 copies and no gradient buffers. ``param.ds_tensor`` is this rank's slice of the flattened parameter
(padded at the end of the last rank) and is updated in place.

[Note: stale gathers] Two things leave gathered copies alive across an update, and a forward pass through such a copy trains
silently wrong: a module fed an input without gradient is not released after backward, and parameters below
``stage3_param_persistence_threshold`` stay gathered on purpose. ``after_backward`` releases the first kind, ``refresh`` drops
and re-gathers the second; tests/sharding/test_zero3.py shows the drift without either.

[Note: gather stream] On a GPU DeepSpeed gathers on a stream of its own. What computes waits for a gather, but no gather waits for
what was computed before it. Whoever writes into shards (a step, ``set_values``, a delta, a snapshot) ends with ``refresh``,
which lets that stream wait. FSDP2 needs nothing of the kind: the root's pre-forward hook lets its gather streams wait.

[Note: whole blocks] DeepSpeed's hooks cost Python time at every module, forward and backward. A decoder block is therefore one
of DeepSpeed's *leaf modules*: gathered, prefetched and released as one, as FSDP2 does, unless it is so large that its bytes count
and its products hide the hooks. When DeepSpeed asks how far away a leaf's next use is, it sees the root module's backward pass,
which contains all blocks, right after forward; without leaf modules it counts to the end of forward and back. Half of its default
distance keeps the same blocks gathered in between.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from trace_dist.config import Quantize
from trace_dist.models.blocks import decoder_blocks, largest, whole_blocks
from trace_dist.models.loading import check_zero_config, load_model_zero3
from trace_dist.models.wrapping import unwrap
from trace_dist.sharding import gloo
from trace_dist.sharding.engine_loop import let_train
from trace_dist.sharding.holding import HoldingModel
from trace_dist.sharding.support import Support
from trace_dist.sharding.throttle import Throttle
from trace_dist.sharding.views import PartitionView, flat_views
from trace_dist.utils import dist
from trace_dist.utils.launch import MPI
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)

PERSISTENCE_THRESHOLD = 10_000
"""Parameters with at most this many elements stay gathered (DeepSpeed's default is 100,000)."""

GATHERED_TOGETHER = 16
"""Parameters that are gathered at once where all are: on a GPU they pass through one buffer."""

IDLE = {
    "gradient_clipping": "clips nothing: give max_grad_norm to MaskedAdamW",
    "fp16.enabled": "scales no loss, and small gradients vanish: use torch.amp.GradScaler, or bf16",
    "scheduler.type": "changes no learning rate: change that of the MaskedAdamW, as torch's schedulers do",
    "zero_optimization.offload_optimizer.device": "moves no states: give offload='cpu' to MaskedAdamW",
}
"""Options of a DeepSpeed config that do nothing where its engine has no optimizer, and what does."""

NODE_RANKS = 8
"""Among so many a collective takes some 30 us (profiling/simulation), of which a block needs one for each weight."""


def start_deepspeed() -> Any:
    """The deepspeed module, with a process group for it to run in.

    On a CPU without its shared-memory operator, which training never calls: building it takes one to three minutes and wants a
    compiler and ninja, a build that was killed leaves a lock on which later jobs hang, and every rank leaves 66 MiB in /dev/shm.
    Nor does it try the compiler on all its operators, as it would to learn whether it can build that one.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    dist.ensure_group()
    _say_device()
    import deepspeed

    # as an attribute of deepspeed.comm, `torch` is PyTorch
    import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    return deepspeed


def _say_device() -> None:
    """DeepSpeed takes LOCAL_RANK, as it is, for the index of the device, which may be the only one that a rank sees; and Open
    MPI's, which counts agents where torchrun runs under mpirun, must equal it."""
    device, of_mpi = dist.local_device(), f"{MPI}_LOCAL_RANK"
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        os.environ["LOCAL_RANK"] = str(device.index)
    if of_mpi in os.environ:
        os.environ[of_mpi] = os.environ.setdefault("LOCAL_RANK", os.environ[of_mpi])


def idle_options(config: dict[str, Any]) -> Iterator[str]:
    """What a DeepSpeed config, as its writer wrote it, asks for and does not get."""
    for name, instead in IDLE.items():
        value: Any = config
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value not in (None, False, 0, "none"):
            yield f"{name}={value} of the DeepSpeed config {instead}"


def check_cut(module: nn.Module, world: int) -> None:
    """Raise ValueError unless DeepSpeed has cut every parameter, as a whole, into one part for each rank."""
    parameters: dict[str, Any] = dict(module.named_parameters())
    for name, parameter in parameters.items():
        shard, whole = parameter.ds_tensor, parameter.ds_numel
        if shard.ds_numel == -(-whole // world) and shard.dtype == parameter.dtype:
            continue
        raise ValueError(
            f"model: DeepSpeed keeps {shard.ds_numel} values ({shard.dtype}) of {name!r} here, which has {whole} "
            f"({parameter.dtype}); masked training needs it cut over all {world} ranks: leave out tensor_parallel, and "
            "data_parallel_group of deepspeed.zero.Init"
        )


def gathers_by_messages() -> bool:
    """Whether weights are gathered by ``sharding.gloo``: on CPUs."""
    return dist.local_device().type == "cpu"


def load_deepspeed() -> Any:
    """The deepspeed module, started, and, on a CPU, with our all-gather over gloo."""
    deepspeed = start_deepspeed()
    if gathers_by_messages():
        deepspeed.comm.comm.cdb.all_gather_function = gloo.all_gather
    return deepspeed


def gathers_one_by_one(world: int, by_messages: bool) -> bool:
    """Whether each weight is gathered by itself, straight to its place, and not through a flat buffer that is copied.

    On a CPU a message costs less than two more copies of every weight; so does a collective among few ranks.
    """
    return by_messages or world <= NODE_RANKS


def max_reuse_distance(whole: bool) -> int:
    """Parameters that come again within this many elements stay gathered; see [Note: whole blocks]."""
    return 500_000_000 if whole else 1_000_000_000


def prefetch_bucket(largest_block: int) -> int:
    """Elements to gather ahead of their use: DeepSpeed's default, or a whole block, so that no part of it is waited for."""
    return max(50_000_000, largest_block)


def zero3_config(
    dtype: torch.dtype,
    persistence_threshold: int = PERSISTENCE_THRESHOLD,
    blocks: Iterable[nn.Module] = (),
) -> dict[str, Any]:
    """The DeepSpeed config of a ZeRO-3 job without an optimizer.

    Args:
        dtype: of the weights.
        persistence_threshold: parameters with at most this many elements stay gathered.
        blocks: modules to gather as one ([Note: whole blocks]).
    """
    blocks = list(blocks)
    classes = sorted({type(block).__name__ for block in blocks})
    by_messages = gathers_by_messages()
    whole = {"leaf_module": {"classes": classes}} if classes else {}
    return {
        "train_micro_batch_size_per_gpu": 1,  # required by DeepSpeed; batches are made by trace_dist
        "steps_per_print": 10**9,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": persistence_threshold,
            "stage3_allgather_sequential": gathers_one_by_one(dist.world_size(), by_messages),
            # On a CPU nothing that is gathered ahead arrives while something is computed.
            "stage3_prefetch_bucket_size": prefetch_bucket(0 if by_messages else largest(blocks)),
            "stage3_max_reuse_distance": max_reuse_distance(bool(classes)),
            **whole,
        },
    }


def _partition_one_by_one(module: nn.Module, config: dict[str, Any]) -> None:
    """Partition an ordinary model so that no device ever holds more of it than one whole parameter. Collective.

    ``deepspeed.initialize`` would move all of it to the device first.
    """
    import deepspeed

    if not any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        deepspeed.zero.Init(module=module, config_dict_or_path=config)
        for part in module.modules():
            for name, buffer in part.named_buffers(recurse=False):
                setattr(part, name, buffer.to(dist.local_device()))


def _gather(parameters: list[Any]) -> None:
    """Gather some parameters; those that are gathered already cost nothing. Collective."""
    if parameters:
        parameters[0].all_gather(param_list=parameters)


def _release(parameters: list[Any]) -> None:
    """Drop gathered copies."""
    if parameters:
        parameters[0].partition(param_list=parameters, has_been_updated=False)


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Without DeepSpeed's hooks, which would release every module after its forward pass; all other hooks stay."""
    kinds: list[dict[int, Any]] = [
        kind for part in module.modules() for kind in (part._forward_pre_hooks, part._forward_hooks) if kind
    ]
    before = [dict(kind) for kind in kinds]
    for kind in kinds:
        for key in [key for key, hook in kind.items() if _is_deepspeeds(hook)]:
            del kind[key]
    try:
        yield
    finally:
        for kind, old in zip(kinds, before, strict=True):
            # In their old order; others may have come and gone meanwhile.
            now = dict(kind)
            kind.clear()
            kind.update({key: hook for key, hook in old.items() if key in now or _is_deepspeeds(hook)} | now)


def _is_deepspeeds(hook: Any) -> bool:
    return str(hook.__module__).partition(".")[0] == "deepspeed"


class Zero3Model(HoldingModel):
    """A model partitioned by DeepSpeed ZeRO-3.

    Args:
        module: an ordinary model (it is partitioned now), or one built under ``deepspeed.zero.Init``.
        persistence_threshold: parameters with at most this many elements stay gathered.
    """

    backend = "zero3"

    def __init__(self, module: nn.Module, persistence_threshold: int = PERSISTENCE_THRESHOLD) -> None:
        deepspeed = load_deepspeed()
        if unwrap(module) is not module:
            logger.warning("model: runs without what wrapped it; call model.module.compile() to compile it")
        module = unwrap(module)
        dtype = next(module.parameters()).dtype
        for parameter in module.parameters():  # or DeepSpeed prepares buffers for gradients
            parameter.requires_grad_(False)
        config = zero3_config(dtype, persistence_threshold, whole_blocks(module).values())
        _partition_one_by_one(module, config)
        engine, *_ = deepspeed.initialize(model=module, config=config)
        self._own(engine)

    @classmethod
    def adopt(cls, engine: Any) -> Zero3Model:
        """Take over a DeepSpeed engine of the caller's, which the caller's loop goes on calling (``engine_loop``).

        A pass through ``engine(...)`` is divided by its ``gradient_accumulation_steps``; one through this model is not.

        Raises:
            ValueError: the engine is not ZeRO-3, has an optimizer, or keeps more copies of the weights.
        """
        if engine.zero_optimization_stage() != 3 or not isinstance(
            engine.optimizer, load_deepspeed().runtime.zero.parameter_offload.DeepSpeedZeRoOffload
        ):
            raise ValueError(
                f"model: a DeepSpeed engine of ZeRO stage {engine.zero_optimization_stage()} with "
                f"{type(engine.optimizer).__name__}; masked training needs stage 3 without an optimizer: call "
                "deepspeed.initialize without optimizer, model_parameters and an 'optimizer' section, or "
                "trace_dist.shard(model, backend='zero3')"
            )
        check_zero_config(engine.config)
        for line in idle_options(engine.config):
            logger.warning(line)
        adopted = cls.__new__(cls)
        adopted._own(engine)
        adopted.roots.append(engine)  # last: a call of this model goes past it
        let_train(engine)
        return adopted

    def still_fits(self, layers: list[nn.Module]) -> bool:
        # It runs without what wraps the model: the layers do not matter.
        return super().still_fits(self.roots)

    def _own(self, engine: Any) -> None:
        check_cut(engine.module, dist.world_size())
        super().__init__(engine.module)
        self._deepspeed, self._engine = load_deepspeed(), engine
        self._order_gathers()
        if self.world > 1 and self._gathering is not None:
            # [Note: blocks ahead] in sharding/throttle.py; one rank gathers nothing.
            event = self._deepspeed.accelerator.get_accelerator().Event
            Throttle(decoder_blocks(engine.module).values(), event)

    @classmethod
    def from_pretrained(cls, path: str, dtype: torch.dtype, quantize: Quantize = "none") -> Zero3Model:
        """Load a checkpoint so that no rank ever holds more than its own shard."""
        load_deepspeed()
        return cls(load_model_zero3(path, dtype, zero3_config(dtype), quantize))

    def views(self, name: str) -> list[PartitionView]:
        numel = prod(self.shape(name))
        return flat_views(numel, -(-numel // self.world), self.world)

    def local(self, name: str) -> Tensor:
        return self._parameters[name].ds_tensor.data.view(-1)[: len(self.views(name)[self.rank])]

    def stamp(self, name: str) -> tuple[int, int]:
        # Written to where DeepSpeed cuts a gathered weight that was changed (``modifier_rank``), not where it gathers one.
        shard = self._parameters[name].ds_tensor
        return shard._version, shard.data_ptr()

    def copies(self) -> list[Tensor]:
        if self.world == 1:  # a single rank's shard is the parameter
            return []
        return [parameter.data for parameter in self._parameters.values() if self._is_gathered(parameter)]

    def _is_gathered(self, parameter: Any) -> bool:
        return parameter.ds_status == self._deepspeed.zero.partition_parameters.ZeroParamStatus.AVAILABLE

    def after_backward(self) -> None:
        self._engine.optimizer.release_backward_leftovers()

    def refresh(self, supports: Iterable[Support]) -> None:
        self._order_gathers()
        changed = [self._parameters[support.name] for support in self.dense(supports)]
        gathered = list(filter(self._is_gathered, changed))
        _release(gathered)
        _gather([parameter for parameter in gathered if parameter.ds_persist or self._is_held])

    @contextmanager
    def _gather_all(self) -> Iterator[None]:
        parameters = list(self._parameters.values())
        with _without_hooks(self.module):
            self._order_gathers()
            for begin in range(0, len(parameters), GATHERED_TOGETHER):
                _gather(parameters[begin : begin + GATHERED_TOGETHER])
            try:
                yield
            finally:
                _release([p for p in parameters if self._is_gathered(p) and not p.ds_persist])

    def _order_gathers(self) -> None:
        """Let DeepSpeed's gathers begin after what this stream has written into the shards ([Note: gather stream])."""
        if self._gathering is not None:
            self._gathering.wait_stream(self._deepspeed.accelerator.get_accelerator().current_stream())

    @property
    def _gathering(self) -> Any:
        """The stream on which DeepSpeed gathers; None where there is one stream, as on a CPU."""
        return self._engine.optimizer._DeepSpeedZeRoOffload__allgather_stream

    @contextmanager
    def gathered(self, parameters: list[Any]) -> Iterator[list[Tensor]]:
        with self._deepspeed.zero.GatheredParameters(parameters):
            yield [parameter.data for parameter in parameters]

    def close(self) -> None:
        """Give DeepSpeed's hooks and buffers back; the model can no longer be used."""
        self.detach()
        self._let_go()
        self._engine.destroy()
