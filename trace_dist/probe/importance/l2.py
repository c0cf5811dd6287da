"""Importance l2: the size of the update, ``|u|``."""

from __future__ import annotations

from torch import Tensor

label = "size of the update"


def energy(update: Tensor, fisher: Tensor) -> Tensor:
    """``u^2`` of each element, fp64."""
    return update.double().square()
