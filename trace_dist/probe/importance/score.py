"""Importance of units from a trace.

    importance(unit) = sqrt(mean over its elements of energy)

A score is a file beside this one that gives ``energy``, the squared importance of each element, from the ``Evidence`` of a warm
start, and says with ``uses_update`` whether it is nothing without one. The mean runs over the elements of a unit, so that units
of different size compare. F is always a mean of squares: a mean of signed gradients cancels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trace_dist.masks.units import UnitLayout
from trace_dist.parts import SCORES
from trace_dist.probe.importance.evidence import Evidence
from trace_dist.probe.warm_start import Trace


def element_energy(evidence: Evidence, score: str) -> Tensor:
    """Squared importance of each element, in the shape of the evidence; fp64, since products of small squares underflow fp32."""
    energy: Tensor = SCORES.load(score).energy(evidence)
    return energy


def unit_importance(trace: Trace, layouts: dict[str, UnitLayout], score: str) -> dict[str, Tensor]:
    """Score of every unit of every maskable parameter: [num_units] fp32."""
    scores = {}
    for name, layout in layouts.items():
        energy = element_energy(trace.evidence[name], score).flatten()
        units = layout.unit_of(torch.arange(layout.numel))
        sums = energy.new_zeros(layout.num_units).index_add_(0, units, energy)
        scores[name] = (sums / layout.sizes(torch.arange(layout.num_units))).sqrt().float()
    return scores
