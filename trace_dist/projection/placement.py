"""Choosing places inside each tensor of a sharded model, under per-tensor budgets.

Scores live per unit. A rank sees only its own slice, so it adds up the units that it touches, one parameter at a
time, and the sums are reduced over ranks; every rank then takes the same top units.
Transient memory: one fp32 score per unit of one parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from trace_dist.masks.format import Mask
from trace_dist.masks.ops import random_scores, top_units
from trace_dist.masks.units import UnitLayout
from trace_dist.sharding.base import ShardedModel
from trace_dist.utils import dist

Scores = Callable[[str, UnitLayout], Tensor]
"""(parameter, layout) -> [num_units] fp32 mean score per element, equal on every rank. May be collective."""


def place(
    layouts: Mapping[str, UnitLayout], granularity: str, budgets: Mapping[str, float], scores: Scores
) -> Mask:
    """The mask with the best-scored units of every tensor. Collective when ``scores`` is.

    Args:
        layouts: every maskable parameter.
        granularity: of the layouts.
        budgets: elements per parameter.
        scores: unit scores of one parameter.
    """
    units = {}
    for name, layout in layouts.items():
        if round(budgets[name]) == 0:
            continue
        chosen = top_units(scores(name, layout), layout, round(budgets[name]))
        if len(chosen):
            units[name] = chosen
    return Mask(units, layouts, granularity)


def reduce_units(
    model: ShardedModel,
    name: str,
    layout: UnitLayout,
    local_values: Tensor,
    places: Tensor | None = None,
    by_unit: bool = False,
) -> Tensor:
    """Mean of per-element values over each unit of a parameter, over all ranks. Collective.

    Args:
        model: where ``local_values`` come from.
        name: the parameter.
        layout: its units.
        local_values: [n] values of this rank's slice, or of ``places`` in it.
        places: [n] flat element indices of the values in the whole parameter; this rank's whole view when None.
        by_unit: ``places`` are unit indices and the values sums over (a rank's part of) units.

    Returns:
        [num_units] fp32 on the CPU; 0 for units without values.
    """
    if places is None:
        view = model.views(name)[model.rank]
        places = torch.arange(view.start, view.stop, device=local_values.device)
    sums = torch.zeros(layout.num_units, dtype=torch.float64, device=local_values.device)
    sums.index_add_(0, places if by_unit else layout.unit_of(places), local_values.double())
    dist.sum_over_ranks(sums)
    return (sums.cpu() / layout.sizes(torch.arange(layout.num_units))).float()


def magnitude_scores(model: ShardedModel) -> Scores:
    """Mean absolute weight of each unit."""
    return lambda name, layout: reduce_units(model, name, layout, model.local(name).float().abs())


def seeded_scores(seed: int) -> Scores:
    """Uniformly random scores, different in every tensor."""
    return lambda name, layout: random_scores(name, layout, seed)
