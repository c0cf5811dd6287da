"""From the proxy's mask of a task to the mask of the large, sharded model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from trace_dist.config import MaskConfig, ProbeConfig, ProjectionConfig, TrainConfig
from trace_dist.data.batches import Batches
from trace_dist.masks.mask import Mask
from trace_dist.masks.ops import compete, layouts_for, place
from trace_dist.masks.select import Units
from trace_dist.masks.units import UnitLayout
from trace_dist.models.roles import describe
from trace_dist.parts import PLACEMENTS
from trace_dist.projection.budget import carry_over, project_budgets, unmatched
from trace_dist.projection.site import Shown, Site
from trace_dist.sharding.base import ShardedModel
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)
TRANSFERRED = "transferred"
"""What made a mask of whole tensors."""
MUCH = 0.1
"""Share of the target without its like in the proxy, above which that is said."""


def needs_proxy(projection: ProjectionConfig) -> bool:
    """Whether a placement reads the proxy's mask; otherwise nothing needs to be probed for it."""
    return getattr(PLACEMENTS.load(projection.placement), "needs_proxy", True)


def needs_scores(projection: ProjectionConfig) -> bool:
    """Whether a placement reads the proxy's scores."""
    return getattr(PLACEMENTS.load(projection.placement), "needs_scores", False)


def needs_module(projection: ProjectionConfig) -> bool:
    """Whether a placement runs the proxy itself."""
    return getattr(PLACEMENTS.load(projection.placement), "needs_module", False)


def num_batches(projection: ProjectionConfig, probe: ProbeConfig) -> int:
    """Batches of a task that the target is trained on or reads, for forecasts; 0 where a placement looks at weights alone."""
    placement = PLACEMENTS.load(projection.placement)
    options = PLACEMENTS.options(projection.placement, projection.options)
    return int(placement.num_batches(options, probe)) if hasattr(placement, "num_batches") else 0


def project_task(
    model: ShardedModel,
    proxy_mask: Mask | None,
    task: str,
    batches: Callable[[], Batches],
    *,
    mask: MaskConfig,
    projection: ProjectionConfig,
    probe: ProbeConfig,
    train: TrainConfig,
    seed: int,
    refused: Units | None = None,
    shown: Shown | None = None,
) -> Mask:
    """The mask of one task on the target, which is left as it was. Collective.

    Args:
        model: the target.
        proxy_mask: the proxy's mask of the task; not None iff the placement needs it.
        task: its name.
        batches: makes the task's batches, from the first one on.
        mask, projection, probe, train: sections of the configuration.
        seed: of the run.
        refused: units of the target that the task may not have; the next best are taken.
        shown: what the proxy has shown; not None iff the placement reads it.

    Raises:
        ValueError: the placement or one of its options does not exist or does not fit the section ``mask``, or the placement
            cannot use the proxy.
    """
    layouts = layouts_for(model, mask.granularity, mask.block, mask.maskable)
    budgets = {} if proxy_mask is None else _budgets(model, proxy_mask, layouts, mask)
    part = PLACEMENTS.load(projection.placement)
    options = PLACEMENTS.options(projection.placement, projection.options)
    if hasattr(part, "check_mask"):
        part.check_mask(options, mask)
    refused = refused or {}
    site = Site(
        model,
        layouts,
        mask.granularity,
        budgets,
        task,
        batches,
        probe,
        train,
        seed,
        refused,
        shown,
        mask.share,
        mask.spread,
    )
    scores = part.scores(site, options)
    if proxy_mask is None:
        placed = compete(layouts, mask.granularity, mask.share, scores, mask.spread, refused)
    else:
        placed = place(layouts, mask.granularity, budgets, scores, refused)
    meta: dict[str, Any] = {"matching": part.matching(site, placed)} if shown is not None else {}
    if proxy_mask is not None:
        meta |= without_counterpart(_shapes(proxy_mask), model.module, layouts)
    return placed.with_meta(method=f"projected/{projection.placement}", **meta)


def _budgets(
    model: ShardedModel, proxy_mask: Mask, layouts: Mapping[str, UnitLayout], mask: MaskConfig
) -> dict[str, float]:
    """Elements that each parameter of the target is to receive."""
    infos = describe(_shapes(proxy_mask))
    return project_budgets(proxy_mask, infos, layouts, describe(model.module), mask.share, mask.spread)


def _shapes(mask: Mask) -> dict[str, tuple[int, ...]]:
    return {name: layout.shape for name, layout in mask.layouts.items()}


def without_counterpart(
    proxy_shapes: Mapping[str, Sequence[int]], target: nn.Module, layouts: Mapping[str, UnitLayout]
) -> dict[str, dict[str, float]]:
    """What a mask says of tensors that are like none of the proxy's: ``unmatched``, role -> share of the maskable elements.

    There is none where the proxy has its like of everything. Where much has none, it is said.

    Args:
        proxy_shapes: of the proxy's maskable parameters.
        target: the target, with storage or without.
        layouts: its maskable parameters.
    """
    found = unmatched(describe(proxy_shapes), describe(target), layouts)
    if sum(found.values()) > MUCH:
        logger.warning(
            "projection: the proxy has no tensors like those of the roles %s, %d %% of what is maskable in the target; all of "
            "them get its mean, whatever their layer; name a proxy of the target's family",
            ", ".join(found), round(100 * sum(found.values())),
        )  # fmt: skip
    return {"unmatched": found} if found else {}


def project_tensors(
    model: ShardedModel,
    scores: Mapping[str, float],
    proxy_shapes: Mapping[str, Sequence[int]],
    mask: MaskConfig,
    refused: Units | None = None,
) -> Mask:
    """The mask of whole tensors whose scores are highest, where the proxy's tensors have the scores.

    A tensor of the target has the score of the proxy's tensors of its role at its relative depth, so that neither widths nor
    numbers of layers need to be matched.

    Args:
        model: the target, or its proxy itself.
        scores: parameter of the proxy -> score.
        proxy_shapes: of the same parameters.
        mask: density, what it is a share of, and what may be masked.
        refused: tensors that the task may not have.
    """
    layouts = layouts_for(model, "tensor", mask.block, mask.maskable)
    mean = sum(scores.values()) / len(scores)
    carried = carry_over(scores, describe(proxy_shapes), describe(model.module), layouts, mean)
    placed = compete(
        layouts, "tensor", mask.share, lambda name, _: torch.tensor([carried[name]]), mask.spread, refused
    )
    return placed.with_meta(method=TRANSFERRED, **without_counterpart(proxy_shapes, model.module, layouts))
