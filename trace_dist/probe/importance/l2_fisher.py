"""Importance l2_fisher: the update weighed by how much the loss feels it, ``|u| sqrt(F)``."""

from __future__ import annotations

from torch import Tensor

from trace_dist.probe.importance.evidence import Evidence

label = "update times the root of the mean squared gradient"
uses_update = True


def energy(evidence: Evidence) -> Tensor:
    """``u^2 F`` of each element, fp64."""
    return evidence.update.double().square() * evidence.fisher.double()
