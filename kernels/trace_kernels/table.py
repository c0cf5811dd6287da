"""Many parameters in one launch: a table says where each one's operands lie, and which programs are whose.

[Note: table] A launch reads a table of int64, one row per parameter: addresses of its operands, what describes its support, where
its programs begin, and whatever else an op needs. A second one says for every program whose it is. Both are made once: operands
must stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import plan
from .runs import Runs

VECTOR = 16
"""Bytes of a load at full width."""
TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int16: tl.int16,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
}


@triton.jit
def pointer(row, COLUMN: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The address in a column of the table."""
    address = tl.load(row + COLUMN).to(tl.pointer_type(TYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


class Tables(NamedTuple):
    """The table [parameters, fields] and the owners [programs] of a launch."""

    table: Tensor
    owners: Tensor


def tables(
    pointers: Sequence[Sequence[int]],
    runs: Sequence[Runs],
    extra: Sequence[Sequence[int]],
    device: torch.device,
) -> Tables:
    """Both tables of a launch.

    Args:
        pointers: of each parameter, addresses of its operands and of its unit ids.
        runs: its support.
        extra: further columns.
        device: where they are wanted; nobody waits for it.

    Returns:
        Rows of addresses, number of units, entries, base, skip, first program, further columns.
    """
    counts = [plan(each).num_programs for each in runs]
    firsts = [0, *accumulate(counts)]
    rows = [
        [*addresses, each.num_units, each.num_entries, each.base, each.skip, first, *more]
        for addresses, each, first, more in zip(pointers, runs, firsts, extra, strict=False)
    ]
    table = torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
    owners = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
    return Tables(table, owners.to(device, non_blocking=True))


def tile_of(runs: Runs, operands: Sequence[Tensor]) -> tuple[tuple[str, int | bool], ...]:
    """How programs cut a support; loads are not at full width where an operand begins elsewhere."""
    tile = dict(plan(runs).constexprs)
    tile["ALIGNED"] &= not any(tensor.data_ptr() % VECTOR for tensor in operands)
    return tuple(tile.items())
