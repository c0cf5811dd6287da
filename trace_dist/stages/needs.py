"""The memory that the work of a run needs, from its models' configs alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trace_dist.config import ModelConfig, RunConfig
from trace_dist.continual.driver import check_methods
from trace_dist.continual.methods.dense import dense_setup
from trace_dist.models.depth import shortened
from trace_dist.models.prune import kept_layers
from trace_dist.profiling.estimate import Estimate, Estimator, load_config
from trace_dist.profiling.memory_setup import MemorySetup
from trace_dist.stages import continual
from trace_dist.stages.memory import EXAMPLES_PER_RANK
from trace_dist.stages.stage import Stage
from trace_dist.utils import dist


@dataclass(frozen=True)
class Need:
    """The memory of one kind of work.

    Attributes:
        what: a method, or the probe.
        num_ranks: processes that need it at the same time.
        estimate: of the first of them.
    """

    what: str
    num_ranks: int
    estimate: Estimate


def estimator_of(model: ModelConfig) -> Estimator | None:
    """None where the model is made by the first run (tiny, GGUF, pruned) and is not there yet."""
    if model.made and not (Path(model.path) / "config.json").is_file():
        return None
    return Estimator(model.path, model.dtype)


def estimator_of_proxy(cfg: RunConfig, target: Estimator | None) -> Estimator | None:
    """Of the model that is probed, in fp32. One whose layers will be taken from a target that is there has a shape already;
    of one that will be narrower it is not known."""
    model, prune = replace(cfg.probed, dtype="float32"), cfg.probed.prune
    found = estimator_of(model)
    if found is not None or prune is None or prune.layers is None or prune.is_narrow or target is None:
        return found
    config = load_config(cfg.target.path)
    kept = kept_layers(config.get_text_config().num_hidden_layers, prune.layers)
    return Estimator(model.path, model.dtype, config=shortened(config, kept))


class Needs:
    """What each kind of work of a run needs.

    Args:
        cfg: the run.
        longest: tokens of the longest training example.
        target: of the target, which must be there.
    """

    def __init__(self, cfg: RunConfig, longest: int, target: Estimator) -> None:
        self.cfg, self.setup = cfg, setup_of(cfg, longest)
        self._estimators = {(cfg.target.dtype, "none"): target}

    def masked(self) -> Estimate:
        """Training of one of the run's masks, on the run's ranks."""
        return self._estimate(self.setup)

    def of_methods(self) -> Iterator[Need]:
        """Each method that trains."""
        for entry in check_methods(self.cfg):
            if entry.kind.trains:
                ranks = continual.runs_on_ranks(self.cfg, entry.name)
                setup = self.setup if ranks else alone(self.cfg, self.setup, self.cfg.train.batch_size)
                own = entry.kind.memory_setup(self.cfg, setup)
                yield Need(entry.name, own.world_size, _beside(self._estimate(own), entry.kind.copies))

    def of_stages(self, stages: Sequence[Stage]) -> Iterator[Need]:
        """The stage that measures full training under ZeRO-3, where it is one of these."""
        if any(stage.arguments[0] == "memory" and not stage.done for stage in stages):
            size = min(self.setup.micro_batch_size, EXAMPLES_PER_RANK)
            full = replace(dense_setup(self.setup), dtype="bfloat16", master=True, micro_batch_size=size)
            yield Need("measuring full training", full.world_size, self._estimate(_unkept(full)))

    def _estimate(self, setup: MemorySetup) -> Estimate:
        kind = setup.dtype, setup.quantize
        if kind not in self._estimators:
            self._estimators[kind] = Estimator(setup.model, *kind)
        return self._estimators[kind](setup)


def _beside(found: Estimate, copies: int) -> Estimate:
    """The same training, with so many copies of the weights beside it."""
    kept = {"kept of earlier tasks": copies * found.states["weights"]} if copies else {}
    states, parts = found.states | kept, found.peak_parts | kept
    return replace(found, states=states, peak_parts=parts, peak=found.peak + sum(kept.values()))


def of_probe(cfg: RunConfig, longest: int, proxy: Estimator) -> Need:
    """The warm start of the proxy."""
    setup = alone(cfg, setup_of(cfg, longest), cfg.probe.batch_size)
    return Need("probe", 1, proxy(_unkept(dense_setup(setup))))


def _unkept(setup: MemorySetup) -> MemorySetup:
    """The same training where nothing looks at validation examples, and no checkpoints are kept."""
    return replace(setup, keep_best=False, checkpoint_async=False)


def alone(cfg: RunConfig, setup: MemorySetup, batch_size: int) -> MemorySetup:
    """The same training in one process."""
    size = min(cfg.train.micro_batch_size, batch_size)
    return replace(setup, backend="single", world_size=1, micro_batch_size=size, sequence_parallel=1)


def setup_of(cfg: RunConfig, longest: int) -> MemorySetup:
    """Training of one of the run's masks."""
    on_cuda = dist.local_device().type == "cuda"
    ranks = cfg.launch.num_ranks
    size = cfg.train.sequence_parallel if ranks % cfg.train.sequence_parallel == 0 else 1
    groups = ranks // size
    return MemorySetup(
        model=cfg.target.path,
        density=cfg.largest.mask.share,
        granularity=cfg.mask.granularity,
        block=cfg.mask.block,
        maskable=cfg.mask.maskable,
        dtype=cfg.target.dtype,
        quantize=cfg.target.quantize,
        state_dtype=cfg.train.state_dtype,
        master=cfg.train.master,
        offload=cfg.train.offload,
        device="cuda" if on_cuda else "cpu",
        backend=cfg.backend,
        world_size=ranks,
        micro_batch_size=min(cfg.train.micro_batch_size, -(-cfg.train.batch_size // groups)),
        sequence_length=max(2, min(longest, cfg.data.max_length)),
        sequence_parallel=size,
        activation_checkpointing=cfg.train.activation_checkpointing,
        keep_best=cfg.train.eval_every > 0 and cfg.train.keep == "best",
        checkpoint_async=cfg.train.checkpoint_async and cfg.train.checkpoint_every != 0,
    )
