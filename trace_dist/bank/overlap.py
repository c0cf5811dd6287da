"""How much of each task's mask other tasks have changed too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from trace_dist.bank.bank import DeltaBank
from trace_dist.masks.mask import Mask
from trace_dist.utils.names import BASE


def overlap(bank: DeltaBank) -> tuple[list[str], Tensor]:
    """Overlap of the tasks' masks; reads the masks, not the values.

    Returns:
        Names of the T tasks, without the base model, and [T, T] fp64: shared entries / entries of the row's task.
    """
    names = [name for name in bank.tasks if name != BASE]
    return names, mask_overlap([bank.mask(name) for name in names])


def mask_overlap(masks: Sequence[Mask]) -> Tensor:
    """Shared entries / entries of the row's mask, of T masks of one model: [T, T] fp64."""
    shared = shared_entries(masks)
    return shared / shared.diagonal()[:, None]


def shared_entries(masks: Sequence[Mask]) -> Tensor:
    """Entries that each two of T masks of one model have in common, whatever their granularities: [T, T] fp64."""
    total = torch.zeros(len(masks), len(masks), dtype=torch.float64)
    for name in dict.fromkeys(name for mask in masks for name in mask):
        total += torch.from_numpy(_shared_in(masks, name))
    return total


def _shared_in(masks: Sequence[Mask], name: str) -> np.ndarray:
    """The same within one parameter: M diag(sizes) M^T with M [T, units], sparse, 1 where a mask selects a unit."""
    layouts = [mask.layouts[name] for mask in masks if name in mask.units]
    alike = all(layout == layouts[0] for layout in layouts)
    chosen = []
    for mask in masks:
        units = torch.empty(0, dtype=torch.int64)
        if name in mask.units:
            units = mask.units[name].long() if alike else mask.elements(name)
        chosen.append(units)
    columns = torch.cat(chosen)
    sizes = layouts[0].sizes(columns) if alike else torch.ones_like(columns)
    starts = np.cumsum([0, *map(len, chosen)])
    shape = (len(masks), layouts[0].num_units if alike else layouts[0].numel)
    weighted = csr_array((sizes.double().numpy(), columns.numpy(), starts), shape)
    plain = csr_array((np.ones(len(columns)), columns.numpy(), starts), shape)
    return (weighted @ plain.T).toarray()
