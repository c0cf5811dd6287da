"""Placement refine: the places where the target's own squared gradients are largest, measured in one sharded pass."""

from __future__ import annotations

import torch
from torch import Tensor

from trace_dist.config import ProbeConfig
from trace_dist.data.batches import Batches
from trace_dist.masks.mask import Mask
from trace_dist.masks.ops import Scores
from trace_dist.masks.unit_sums import add_squares
from trace_dist.masks.units import UnitLayout
from trace_dist.projection.site import Site
from trace_dist.projection.unit_means import reduce_units
from trace_dist.sharding.base import ShardedModel
from trace_dist.sharding.support import Support
from trace_dist.train.loss import accumulate

label = "root of the target's mean squared gradient"


def scores(site: Site, options: None) -> Scores:
    """Scores of every unit of the target. Collective."""
    return fisher_scores(site.model, site.layouts, site.batches(), site.probe.fisher_batches)


def num_batches(options: None, probe: ProbeConfig) -> int:
    """Batches of the task that the target reads."""
    return probe.fisher_batches


def full_mask(layouts: dict[str, UnitLayout]) -> Mask:
    """Every maskable parameter as one unit."""
    whole = {name: UnitLayout(layout.shape, layout.numel) for name, layout in layouts.items()}
    return Mask({name: torch.zeros(1, dtype=torch.int32) for name in whole}, whole, "tensor")


def fisher_scores(
    model: ShardedModel, layouts: dict[str, UnitLayout], batches: Batches, num_batches: int
) -> Scores:
    """Root of the mean squared gradient of each unit at the present weights, over some global batches. Collective.

    No gradient is kept, so none can be added up over a step's micro-batches: each micro-batch (of all ranks together) is a
    sample of its own, scaled to the size of a step's gradient. With one micro-batch per step this is the warm start's Fisher.

    Memory on each rank: one number per unit it touches (fp32; fp64 for units of many elements, whose sums would lose
    small terms), and one bucket of gradients.
    """
    views = {name: model.views(name)[model.rank] for name in layouts}
    touched = {name: layouts[name].unit_range(view.start, view.stop) for name, view in views.items()}
    sums: dict[str, Tensor] = {}
    weight = 0.0

    def collect(support: Support, values: Tensor) -> None:
        layout, view = layouts[support.name], views[support.name]
        dtype = torch.float32 if layout.unit == 1 else torch.float64
        if support.name not in sums:
            sums[support.name] = torch.zeros(len(touched[support.name]), dtype=dtype, device=values.device)
        add_squares(sums[support.name], layout, values, view.start, weight)

    model.attach(full_mask(layouts), collect)
    model.train()
    stream = iter(batches)
    for _ in range(num_batches):
        step = next(stream)
        weight = len(step.micro_batches) / num_batches
        accumulate(step, model, lambda loss: model.backward(loss, reduction="sum"), model.device)
    model.detach()

    def scores(name: str, layout: UnitLayout) -> Tensor:
        units = torch.arange(touched[name].start, touched[name].stop, device=model.device)
        local = sums.get(name, torch.zeros(len(units), device=model.device))
        return reduce_units(model, name, layout, local, units, by_unit=True).sqrt()

    return scores
