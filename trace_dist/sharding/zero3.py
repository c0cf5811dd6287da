"""Backend ``zero3``: DeepSpeed ZeRO-3 partitions the parameters; updates happen inside each rank's partition.

DeepSpeed is initialised *without an optimizer*: it then builds only its parameter partitioning and its fetch, prefetch and
release hooks, no fp32 copies and no gradient buffers. ``param.ds_tensor`` is this rank's slice of the flattened parameter
(padded at the end of the last rank) and is updated in place.

[Note: stale gathers] Two things leave gathered copies alive across an update, and a forward pass through such a copy trains
silently wrong: a module fed an input without gradient is not released after backward, and parameters below
``stage3_param_persistence_threshold`` stay gathered on purpose. ``after_backward`` releases the first kind, ``refresh`` drops
and re-gathers the second; tests/sharding/test_zero3.py shows the drift without either.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trace_dist.models.loading import load_model_zero3
from trace_dist.sharding.base import PartitionView, ShardedModel
from trace_dist.utils import dist

PERSISTENCE_THRESHOLD = 10_000
"""Parameters with at most this many elements stay gathered (DeepSpeed's default is 100,000)."""


def _deepspeed() -> Any:
    """The deepspeed module, with a process group for it to run in."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    dist.ensure_group()
    import deepspeed

    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    return deepspeed


def zero3_config(dtype: torch.dtype, persistence_threshold: int = PERSISTENCE_THRESHOLD) -> dict[str, Any]:
    """The DeepSpeed config of a ZeRO-3 job without an optimizer."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # required by DeepSpeed; batches are made by trace_dist
        "steps_per_print": 10**9,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": persistence_threshold},
    }


class Zero3Model(ShardedModel):
    """A model partitioned by DeepSpeed ZeRO-3.

    Args:
        module: an ordinary model (it is partitioned now), or one built under ``deepspeed.zero.Init``.
        persistence_threshold: parameters with at most this many elements stay gathered.
    """

    backend = "zero3"

    def __init__(self, module: nn.Module, persistence_threshold: int = PERSISTENCE_THRESHOLD) -> None:
        deepspeed = _deepspeed()
        super().__init__(module)
        dtype = next(module.parameters()).dtype
        self._deepspeed = deepspeed
        self._engine, *_ = deepspeed.initialize(
            model=module, config=zero3_config(dtype, persistence_threshold)
        )
        self.module = self._engine.module
        self._parameters: dict[str, Any] = dict(self.module.named_parameters())

    @classmethod
    def from_pretrained(cls, path: str, dtype: torch.dtype) -> Zero3Model:
        """Load a checkpoint so that no rank ever holds more than its own shard."""
        _deepspeed()
        return cls(load_model_zero3(path, dtype, zero3_config(dtype)))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._parameters[name].ds_shape)

    def views(self, name: str) -> list[PartitionView]:
        parameter = self._parameters[name]
        size, numel = parameter.ds_tensor.numel(), parameter.ds_numel
        return [PartitionView(min(r * size, numel), min((r + 1) * size, numel)) for r in range(self.world)]

    def local(self, name: str) -> Tensor:
        return self._parameters[name].ds_tensor.data.view(-1)[: len(self.views(name)[self.rank])]

    def after_backward(self) -> None:
        self._engine.optimizer.release_backward_leftovers()

    def refresh(self, names: Iterable[str]) -> None:
        status = self._deepspeed.zero.partition_parameters.ZeroParamStatus
        gathered = [p for p in map(self._parameters.__getitem__, names) if p.ds_status == status.AVAILABLE]
        if not gathered:
            return
        gathered[0].partition(param_list=gathered, has_been_updated=False)
        persistent = [parameter for parameter in gathered if parameter.ds_persist]
        if persistent:
            persistent[0].all_gather(param_list=persistent)

    def full_parameter(self, name: str) -> Tensor | None:
        parameter = self._parameters[name]
        with self._deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().cpu().clone() if self.rank == 0 else None

    def close(self) -> None:
        """Give DeepSpeed's hooks and buffers back; the model can no longer be used."""
        self.detach()
        self._engine.destroy()


class FullAdamW:
    """Ordinary ZeRO-3 training of every parameter with AdamW: what masked training is compared with.

    Args:
        path: Hugging Face id or folder.
        dtype: of the weights; DeepSpeed keeps an fp32 master.
        lr: learning rate.
    """

    def __init__(self, path: str, dtype: torch.dtype, lr: float) -> None:
        deepspeed = _deepspeed()
        config = zero3_config(dtype) | {"gradient_clipping": 1.0}
        module = load_model_zero3(path, dtype, config)
        optimizer = torch.optim.AdamW(module.parameters(), lr=lr)
        config["zero_allow_untested_optimizer"] = True
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        self.module = self._engine

    def backward(self, loss: Tensor) -> None:
        """Backward pass through DeepSpeed, which reduces and partitions the gradients."""
        self._engine.backward(loss)

    def step(self) -> None:
        """Optimizer step."""
        self._engine.step()

    def states(self) -> dict[str, list[Tensor]]:
        """This rank's model states, by category."""
        optimizer = self._engine.optimizer
        moments = list(optimizer.optimizer.state.values())
        return {
            "weights": [parameter.ds_tensor for parameter in self._engine.module.parameters()],
            "master": list(optimizer.fp32_partitioned_groups_flat),
            "exp_avg": [state["exp_avg"] for state in moments],
            "exp_avg_sq": [state["exp_avg_sq"] for state in moments],
            "gradients": [optimizer.grad_partitions_flat_buffer],
        }

    def close(self) -> None:
        """Give DeepSpeed's hooks and buffers back."""
        self._engine.destroy()
