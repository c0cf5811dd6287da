"""Importance l2: the size of the update, ``|u|``."""

from __future__ import annotations

from torch import Tensor

from trace_dist.probe.importance.evidence import Evidence

label = "size of the update"
uses_update = True


def energy(evidence: Evidence) -> Tensor:
    """``u^2`` of each element, fp64."""
    return evidence.update.double().square()
