"""The bytes that our own kernels move, from what they are launched with.

Random units touch whole sectors of memory: of a bf16 vector, of which single elements are masked at 5 %, more than half.
``trace_kernels.traffic`` counts this from a mask's indices; here it is the expectation, since a simulated rank has none on its
accelerator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from trace_kernels.masked_adamw import Operands
from trace_kernels.traffic import SECTOR, accesses


def touched_bytes(numel: int, itemsize: int, entries: int, block: int) -> float:
    """Bytes of the sectors in which some of ``numel`` elements lie, random units of ``block``, ``entries`` in all."""
    if not entries or not numel:
        return 0.0
    unit = block * itemsize
    density = min(1.0, entries / numel)
    if unit < SECTOR:
        return numel * itemsize * (1.0 - (1.0 - density) ** (SECTOR / unit))
    # A unit begins anywhere in its first sector, unless units fill sectors.
    overhang = 0 if unit % SECTOR == 0 else SECTOR - itemsize
    return min(float(numel * itemsize), entries * itemsize * (1.0 + overhang / unit))


def adamw_bytes(members: list[Operands]) -> float:
    """Of a launch that takes the AdamW steps of several parameters."""
    total = 0.0
    for state in members:
        runs, weight = state.runs, state.weight
        total += touched_bytes(weight.numel(), weight.element_size(), runs.num_entries, runs.block)
        for access in accesses("masked_adamw", weight.dtype):
            if access.operand == "position":
                total += access.num_bytes * access.times * runs.num_entries
        total += runs.units.nbytes
    return total


def _gap_gather(args: tuple[Any, ...]) -> float:
    source, words, _, out, *_ = args
    return touched_bytes(source.numel(), source.element_size(), out.numel(), 1) + words.nbytes + out.nbytes


def _of_runs(args: tuple[Any, ...]) -> float:
    """(whole, compact, ..., units, number of units, entries, block, base, skip)."""
    whole, compact, units, entries, block = args[0], args[1], args[-6], args[-4], args[-3]
    local = touched_bytes(whole.numel(), whole.element_size(), entries, block)
    return local + compact.nbytes + units.nbytes


BY_NAME: dict[str, Callable[[tuple[Any, ...]], float]] = {
    "_gap_gather_kernel": _gap_gather,
    "_compact_gather_kernel": _of_runs,
    "_compact_scatter_kernel": _of_runs,
    "_delta_swap_kernel": _of_runs,
}


def launched_bytes(kernel: Any, args: tuple[Any, ...]) -> float:
    """Of one launch; a kernel without a formula of its own moves its tensors once."""
    name = getattr(kernel, "fn", kernel).__name__
    if name in BY_NAME:
        return BY_NAME[name](args)
    return float(sum(each.nbytes for each in args if isinstance(each, Tensor)))
