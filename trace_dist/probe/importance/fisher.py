"""Importance fisher: the root of the mean squared gradient, ``sqrt(F)``."""

from __future__ import annotations

from torch import Tensor

label = "root of the mean squared gradient"


def energy(update: Tensor, fisher: Tensor) -> Tensor:
    """``F`` of each element, fp64."""
    return fisher.double()
