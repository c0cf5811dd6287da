"""Means over the units of a sharded model.

A rank sees only its own slice, so it adds up the units that it touches, one parameter at a time, and the sums are reduced
over ranks; every rank then takes the same top units. Transient memory: one fp64 sum per unit of one parameter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trace_dist.masks.unit_sums import add_at
from trace_dist.masks.units import UnitLayout
from trace_dist.sharding.base import ShardedModel
from trace_dist.utils import dist


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
    add_at(sums, places if by_unit else layout.unit_of(places), local_values.double())
    dist.sum_over_ranks(sums)
    return (sums.cpu() / layout.sizes(torch.arange(layout.num_units))).float()
