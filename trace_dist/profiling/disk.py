"""What a masked training writes to disks that all ranks share: checkpoints, and its delta into the bank."""

from __future__ import annotations

from typing import NamedTuple

from trace_dist.masks.gaps import expected_bytes
from trace_dist.profiling.estimate import Estimator
from trace_dist.profiling.memory_setup import MemorySetup
from trace_dist.profiling.selection import moment_bytes, selections


class Disk(NamedTuple):
    """Bytes, of all ranks together.

    Attributes:
        checkpoint: one of them, with its mask and the best values (``keep_best``); two are kept.
        delta: what a task adds to the bank, beside its signature.
    """

    checkpoint: int
    delta: int


def disk_bytes(estimator: Estimator, setup: MemorySetup) -> Disk:
    """What a setup writes, headers apart; the indices of a delta are those of a random mask, on average."""
    layouts = estimator.layouts(setup.granularity, setup.block, setup.maskable)
    value = 4 if setup.master else estimator.itemsize
    values = value * (2 if setup.keep_best else 1)
    checkpoint = delta = 0
    for name, chosen in selections(layouts, setup.density).items():
        checkpoint += values * chosen.entries + 2 * moment_bytes(chosen.entries, setup.state_dtype)
        checkpoint += layouts[name].index_dtype.itemsize * chosen.units
        delta += estimator.itemsize * chosen.entries + expected_bytes(chosen.units, layouts[name].num_units)
    return Disk(checkpoint, delta)
