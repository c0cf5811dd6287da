"""Importance of units from a trace.

    importance(unit) = sqrt(mean over its elements of energy(u, F))

with ``u`` the update of the warm start and ``F`` the mean squared gradient after it. A score is a file beside this one that
gives ``energy``, the squared importance of one element. The mean runs over the elements of a unit, so that units of
different size compare. F is always a mean of squares: a mean of signed gradients cancels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trace_dist.masks.units import UnitLayout
from trace_dist.parts import SCORES
from trace_dist.probe.warm_start import Trace


def element_energy(update: Tensor, fisher: Tensor, score: str) -> Tensor:
    """Squared importance of each element, in the shape of the inputs; fp64, since products of small squares underflow fp32."""
    energy: Tensor = SCORES.load(score).energy(update, fisher)
    return energy


def unit_importance(trace: Trace, layouts: dict[str, UnitLayout], score: str) -> dict[str, Tensor]:
    """Score of every unit of every maskable parameter: [num_units] fp32."""
    scores = {}
    for name, layout in layouts.items():
        energy = element_energy(trace.update[name], trace.fisher[name], score).flatten()
        units = layout.unit_of(torch.arange(layout.numel))
        sums = energy.new_zeros(layout.num_units).index_add_(0, units, energy)
        scores[name] = (sums / layout.sizes(torch.arange(layout.num_units))).sqrt().float()
    return scores
