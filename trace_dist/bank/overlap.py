"""How much of each task's mask other tasks have changed too."""

from __future__ import annotations

import torch
from torch import Tensor

from trace_dist.bank.bank import DeltaBank
from trace_dist.masks.format import Mask
from trace_dist.utils.names import BASE


def overlap(bank: DeltaBank) -> tuple[list[str], Tensor]:
    """Overlap of the tasks' masks; reads the masks, not the values.

    Returns:
        Names of the T tasks, without the base model, and [T, T] fp64: shared entries / entries of the row's task.
    """
    names = [name for name in bank.tasks if name != BASE]
    masks = [bank.mask(name) for name in names]
    shared = torch.zeros(len(names), len(names), dtype=torch.float64)
    for row, left in enumerate(masks):
        for column, right in enumerate(masks[: row + 1]):
            shared[row, column] = shared[column, row] = num_shared(left, right)
    return names, shared / shared.diagonal()[:, None]


def num_shared(left: Mask, right: Mask) -> int:
    """Entries that two masks of one model have in common, whatever their granularities."""
    total = 0
    for name in left.units.keys() & right.units.keys():
        layout = left.layouts[name]
        if layout == right.layouts[name]:
            total += int(layout.sizes(_both(left.units[name], right.units[name])).sum())
        else:
            total += len(_both(left.elements(name), right.elements(name)))
    return total


def _both(one: Tensor, other: Tensor) -> Tensor:
    """What two sorted lists without repeats have in common: sorted."""
    place = torch.searchsorted(other, one.to(other.dtype)).clamp_(max=len(other) - 1)
    return one[other[place] == one]
