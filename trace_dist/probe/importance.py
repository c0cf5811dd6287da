"""Importance of units from a trace.

    l2         sqrt(mean u^2)           u = update of the warm start
    fisher     sqrt(mean F)             F = mean squared gradient
    l2_fisher  sqrt(mean u^2 F)         for one element: |u| sqrt(F)

The means run over the elements of a unit, so that units of different size compare. F is always a mean of squares: a mean of
signed gradients cancels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trace_dist.config import Score
from trace_dist.masks.units import UnitLayout
from trace_dist.probe.warm_start import Trace


def element_energy(update: Tensor, fisher: Tensor, score: Score) -> Tensor:
    """Squared importance of each element, in the shape of the inputs; fp64, since products of small squares underflow fp32."""
    if score == "l2":
        return update.double().square()
    if score == "fisher":
        return fisher.double()
    return update.double().square() * fisher.double()


def unit_importance(trace: Trace, layouts: dict[str, UnitLayout], score: Score) -> dict[str, Tensor]:
    """Score of every unit of every maskable parameter: [num_units] fp32."""
    scores = {}
    for name, layout in layouts.items():
        energy = element_energy(trace.update[name], trace.fisher[name], score).flatten()
        sums = energy.new_zeros(layout.num_units).index_add_(
            0, layout.unit_of(torch.arange(layout.numel)), energy
        )
        scores[name] = (sums / layout.sizes(torch.arange(layout.num_units))).sqrt().float()
    return scores
