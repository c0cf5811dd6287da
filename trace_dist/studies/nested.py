"""Masks of several densities from one selection: the best units of the largest mask are those of the smaller ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import floor

import torch

from trace_dist.masks.mask import Mask
from trace_dist.masks.ops import compete
from trace_dist.masks.select import Scores
from trace_dist.masks.tied import Tied
from trace_dist.masks.units import UnitLayout


def nested_masks(
    layouts: Mapping[str, UnitLayout], granularity: str, densities: Sequence[float], scores: Scores
) -> dict[float, Mask]:
    """What ``compete`` makes at each density, at the price of the largest one.

    Args:
        layouts: every maskable parameter.
        granularity: of the layouts.
        densities: shares of all elements.
        scores: unit scores of one parameter.
    """
    if Tied.of(layouts, granularity).groups:
        # What is tied is not taken apart.
        return {density: compete(layouts, granularity, density, scores) for density in densities}
    largest = max(densities)
    mask = compete(layouts, granularity, largest, scores)
    names = [name for name in layouts if name in mask.units]
    units = [mask.units[name].long() for name in names]
    values = torch.cat(
        [scores(name, layouts[name]).cpu()[own] for name, own in zip(names, units, strict=True)]
    )
    sizes = torch.cat([layouts[name].sizes(own) for name, own in zip(names, units, strict=True)])
    # Ties go to the earlier tensor and the lower index, as in ``compete``.
    order = values.argsort(descending=True, stable=True)
    needed = 2 * sizes[order].cumsum(0) - sizes[order]
    total, found = sum(layout.numel for layout in layouts.values()), {largest: mask}
    for density in set(densities) - {largest}:
        chosen = torch.zeros(len(values), dtype=torch.bool)
        chosen[order[needed <= floor(2 * density * total)]] = True
        parts = zip(names, units, chosen.split([len(own) for own in units]), strict=True)
        kept = {name: own[part].to(layouts[name].index_dtype) for name, own, part in parts if part.any()}
        found[density] = Mask(kept, layouts, granularity)
    return {density: found[density] for density in densities}
