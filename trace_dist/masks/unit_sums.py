"""Sums over the units of a parameter whose bits are the same in every run, on every device.

``index_add_`` on a GPU adds by atomics, in the order in which threads come: scores that nearly tie would fall one way in one run
and the other way in the next, and so would the mask. Contiguous units of one slice are summed by a kernel of fixed order
(``trace_kernels.unit_reduce``), everything else by torch's deterministic variant. On a CPU ``index_add_`` has one order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from trace_kernels.unit_reduce import unit_sumsq

from trace_dist.masks.units import UnitLayout


def add_at(sums: Tensor, units: Tensor, values: Tensor, weight: float = 1.0) -> None:
    """Add values, times ``weight``, to the sums of their units, in place.

    Args:
        sums: [m].
        units: [n] int64 places in ``sums``, in any order, repeated or not.
        values: [n] of the dtype of ``sums``.
        weight: factor on the values.
    """
    with _in_order(sums.device):
        sums.index_add_(0, units, values, alpha=weight)


def add_squares(sums: Tensor, layout: UnitLayout, values: Tensor, start: int, weight: float) -> None:
    """Add the squares of a slice's values, times ``weight``, to the sums of the units that the slice touches, in place.

    Args:
        sums: [units touched] fp32 or fp64: ``layout.unit_range(start, start + n)``.
        layout: of the parameter.
        values: [n] of the flattened parameter, from ``start`` on.
        start: where the slice begins.
        weight: factor on the squares.
    """
    if values.device.type != "cpu" and not layout.scattered:
        sums.add_(unit_sumsq(values, layout.unit, start)[1], alpha=weight)
        return
    stop = start + len(values)
    first = layout.unit_range(start, stop).start
    units = layout.unit_of(torch.arange(start, stop, device=values.device)) - first
    add_at(sums, units, values.to(sums.dtype).square(), weight)


@contextmanager
def _in_order(device: torch.device) -> Iterator[None]:
    """Torch's deterministic algorithms inside the block; on a CPU nothing changes."""
    before, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    if device.type == "cpu" or before:
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
