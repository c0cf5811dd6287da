"""From the proxy's mask of a task to the mask of the large, sharded model."""

from __future__ import annotations

from collections.abc import Callable

from trace_dist.config import MaskConfig, ProbeConfig, ProjectionConfig, TrainConfig
from trace_dist.data.batches import Batches
from trace_dist.masks.mask import Mask
from trace_dist.masks.ops import layouts_for, place
from trace_dist.masks.select import Units
from trace_dist.models.roles import describe
from trace_dist.parts import PLACEMENTS
from trace_dist.projection.budget import project_budgets
from trace_dist.projection.site import Site
from trace_dist.sharding.base import ShardedModel


def project_task(
    model: ShardedModel,
    proxy_mask: Mask,
    task: str,
    batches: Callable[[], Batches],
    *,
    mask: MaskConfig,
    projection: ProjectionConfig,
    probe: ProbeConfig,
    train: TrainConfig,
    seed: int,
    refused: Units | None = None,
) -> Mask:
    """The mask of one task on the target, which is left as it was. Collective.

    Args:
        model: the target.
        proxy_mask: the proxy's mask of the task.
        task: its name.
        batches: makes the task's batches, from the first one on.
        mask, projection, probe, train: sections of the configuration.
        seed: of the run.
        refused: units of the target that the task may not have; the next best are taken.

    Raises:
        ValueError: the placement or one of its options does not exist.
    """
    layouts = layouts_for(model, mask.granularity, mask.block, mask.maskable)
    proxy_infos = describe({name: layout.shape for name, layout in proxy_mask.layouts.items()})
    budgets = project_budgets(proxy_mask, proxy_infos, layouts, describe(model.module), mask.density)
    options = PLACEMENTS.options(projection.placement, projection.options)
    site = Site(model, layouts, mask.granularity, budgets, task, batches, probe, train, seed, refused or {})
    scores = PLACEMENTS.load(projection.placement).scores(site, options)
    placed = place(layouts, mask.granularity, budgets, scores, refused)
    return placed.with_meta(method=f"projected/{projection.placement}")
