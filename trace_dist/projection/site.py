"""What a placement may look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from trace_dist.config import ProbeConfig, TrainConfig
from trace_dist.config.mask import FREE, Spread
from trace_dist.data.batches import Batches
from trace_dist.masks.select import Units
from trace_dist.masks.units import UnitLayout
from trace_dist.models.origin import Origin
from trace_dist.sharding.base import ShardedModel


@dataclass(frozen=True)
class Shown:
    """What the proxy has shown of the task, entry by entry.

    Attributes:
        scores: parameter of the proxy -> importance of its units, [num_units] fp32.
        layouts: its maskable parameters.
        origin: which part of the target the proxy is; None where it is none.
        module: the proxy itself; not None iff the placement has ``needs_module`` and the proxy reads the target's tokens.
    """

    scores: Mapping[str, Tensor]
    layouts: Mapping[str, UnitLayout]
    origin: Origin | None
    module: nn.Module | None = None


@dataclass(frozen=True)
class Outline:
    """What is known of proxy and target before weights are loaded and anything is probed.

    Attributes:
        target, proxy: the models, without storage.
        target_layouts, layouts: their maskable parameters.
        origin: which part of the target the proxy says that it is; None where it says nothing.
        modality: name of what examples are.
        same_tokens: whether both have one vocabulary; reads their tokenizers.
    """

    target: nn.Module
    proxy: nn.Module
    target_layouts: Mapping[str, UnitLayout]
    layouts: Mapping[str, UnitLayout]
    origin: Origin | None
    modality: str
    same_tokens: Callable[[], bool]


@dataclass(frozen=True)
class Site:
    """One task on the sharded target, for which places are chosen.

    Attributes:
        model: the target, which a placement leaves as it was.
        layouts: its maskable parameters.
        granularity: what is selected together.
        budgets: elements that each parameter is to receive.
        task: name of the task.
        batches: makes the task's batches, from the first one on.
        probe: how importance is measured.
        train: options of optimizer and loop.
        seed: of the run.
        refused: units that the task may not have, which earlier ones hold.
        shown: what the proxy has shown; not None iff the placement has ``needs_scores``.
        density: of the mask that is wanted.
        spread: least and greatest density of a tensor in it.
    """

    model: ShardedModel
    layouts: dict[str, UnitLayout]
    granularity: str
    budgets: dict[str, float]
    task: str
    batches: Callable[[], Batches]
    probe: ProbeConfig
    train: TrainConfig
    seed: int
    refused: Units
    shown: Shown | None = None
    density: float = 1.0
    spread: Spread = FREE
