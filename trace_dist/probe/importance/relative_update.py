"""Importance relative_update: the update beside the weight, ``|u| / |w|``.

A weight smaller than a thousandth of its parameter's root mean square counts as that much, or entries near zero would fill
every mask. Where some entries alone are measured, as on a pool, the root mean square is theirs.
"""

from __future__ import annotations

from torch import Tensor

from trace_dist.probe.importance.evidence import Evidence

label = "update over weight"
uses_update = True
FLOOR = 1e-3
"""Least weight that counts, over the root mean square of the parameter's weights."""


def energy(evidence: Evidence) -> Tensor:
    """``u^2 / w^2`` of each element, fp64."""
    squares = evidence.weight.double().square()
    mean = float(squares.mean()) if evidence.mean_square is None else evidence.mean_square
    least = max(FLOOR**2 * mean, 1e-300)  # a parameter of zeros
    return evidence.update.double().square() / squares.clamp(min=least)
