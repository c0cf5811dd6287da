"""Importance of units from a trace.

    importance(unit) = sqrt(mean over its elements of energy)

A score is a file beside this one that gives ``energy``, the squared importance of each element, from the ``Evidence`` of a warm
start, and says with ``uses_update`` whether it is nothing without one. The mean runs over the elements of a unit, so that units
of different size compare. F is always a mean of squares: a mean of signed gradients cancels.

A score may be made of others instead, which it names as ``parts``. Of several, ``combine`` makes the scores of all units of the
model, so that it can scale them over the model. One with ``contrast`` compares a task with the others (``contrast.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trace_dist.masks.units import UnitLayout
from trace_dist.parts import SCORES
from trace_dist.probe.importance.evidence import Evidence, Trace


def element_energy(evidence: Evidence, score: str) -> Tensor:
    """Squared importance of each element, in the shape of the evidence; fp64, since products of small squares underflow fp32."""
    energy: Tensor = SCORES.load(score).energy(evidence)
    return energy


def parts_of(score: str) -> tuple[str, ...]:
    """The scores that a score is made of, itself where it is made of no others."""
    found: tuple[str, ...] = getattr(SCORES.load(score), "parts", (score,))
    return found


def combined(score: str, parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The score of all units from those of its parts (``parts_of``), each parameter -> [num_units] fp32."""
    if len(parts) == 1:
        return parts[0]
    found: dict[str, Tensor] = SCORES.load(score).combine(parts)
    return found


def unit_importance(trace: Trace, layouts: dict[str, UnitLayout], score: str) -> dict[str, Tensor]:
    """Score of every unit of every maskable parameter: [num_units] fp32."""
    return combined(score, [_unit_means(trace, layouts, part) for part in parts_of(score)])


def _unit_means(trace: Trace, layouts: dict[str, UnitLayout], score: str) -> dict[str, Tensor]:
    """A score that is made of no others."""
    scores = {}
    for name, layout in layouts.items():
        energy = element_energy(trace.evidence[name], score).flatten()
        units = layout.unit_of(torch.arange(layout.numel))
        sums = energy.new_zeros(layout.num_units).index_add_(0, units, energy)
        scores[name] = (sums / layout.sizes(torch.arange(layout.num_units))).sqrt().float()
    return scores
