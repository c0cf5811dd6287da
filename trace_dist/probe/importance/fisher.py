"""Importance fisher: the root of the mean squared gradient, ``sqrt(F)``. With ``probe.steps: 0`` that of the base."""

from __future__ import annotations

from torch import Tensor

from trace_dist.probe.importance.evidence import Evidence

label = "root of the mean squared gradient"
uses_update = False


def energy(evidence: Evidence) -> Tensor:
    """``F`` of each element, fp64."""
    return evidence.fisher.double()
