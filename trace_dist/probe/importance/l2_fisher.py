"""Importance l2_fisher: the update weighed by how much the loss feels it, ``|u| sqrt(F)``."""

from __future__ import annotations

from torch import Tensor

label = "update times the root of the mean squared gradient"


def energy(update: Tensor, fisher: Tensor) -> Tensor:
    """``u^2 F`` of each element, fp64."""
    return update.double().square() * fisher.double()
