"""Numbers that are no longer numbers: an infinite or NaN loss, gradient or weight stops work before it is kept."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor


class NotFinite(ValueError):
    """Something is infinite or NaN."""


def check_finite(value: float, what: str) -> None:
    """Raise NotFinite where a number is infinite or NaN; ``what`` is its name in the message."""
    if not math.isfinite(value):
        raise NotFinite(f"{what} is {value}")


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every floating-point element is finite; tensors of other types are passed over."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors if tensor.is_floating_point())
