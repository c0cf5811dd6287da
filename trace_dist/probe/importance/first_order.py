"""Importance first_order: what the loss would change by if the weight were zero, to first order, ``|w| sqrt(F)``.

Molchanov et al. 2019 (arXiv 1906.10771) average the square of weight times gradient over batches, as here. A weight of zero
scores zero, however much the task pulls at it.
"""

from __future__ import annotations

from torch import Tensor

from trace_dist.probe.importance.evidence import Evidence

label = "weight times the root of the mean squared gradient"
uses_update = False


def energy(evidence: Evidence) -> Tensor:
    """``w^2 F`` of each element, fp64."""
    return evidence.weight.double().square() * evidence.fisher.double()
