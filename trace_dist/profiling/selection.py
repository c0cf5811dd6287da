"""How much of a model a random mask selects, and the bytes that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, floor
from typing import NamedTuple

from trace_kernels.dispatch import TILE

from trace_dist.config import StateDtype
from trace_dist.masks.gaps import expected_bytes
from trace_dist.masks.units import UnitLayout
from trace_dist.profiling.memory_setup import MemorySetup

QUANTIZATION_BLOCK = 256
"""Entries that share one fp32 scale in 8-bit moments."""


@dataclass(frozen=True)
class Selection:
    """How much of one parameter a random mask selects."""

    units: int
    entries: int


def selections(layouts: Mapping[str, UnitLayout], density: float) -> dict[str, Selection]:
    """What ``masks.mask.random_mask`` selects of every parameter: exact, but for ragged layouts, where it is the expectation."""
    found, carry = {}, 0.0
    for name, layout in layouts.items():
        budget = density * layout.numel + carry
        size = layout.numel / layout.num_units
        units = min(layout.num_units, max(0, floor(budget / size + 0.5)))
        carry = budget - units * size
        if units:
            found[name] = Selection(units, round(units * size))
    return found


def formed_elements(layout: UnitLayout, selection: Selection) -> int:
    """Elements of a weight's gradient that are formed: the masked rows or columns, or all."""
    return layout.numel if layout.lines is None else selection.entries


def kernel_decodes(layout: UnitLayout, setup: MemorySetup) -> bool:
    """Whether a kernel decodes a parameter's indices where it picks the entries (``Support.starts``), and nothing else does."""
    shared = setup.world_size > 1 and setup.device != "cpu"
    return shared and layout.unit == 1 and not layout.scattered


def decoded_bytes(layout: UnitLayout, selection: Selection, setup: MemorySetup) -> int:
    """Bytes of a mask's indices while entries are picked out of a whole gradient (``Support.whole``)."""
    if setup.world_size == 1 or formed_elements(layout, selection) != layout.numel:
        return 0
    if kernel_decodes(layout, setup):
        return 0
    runs = _runs(layout, selection)
    return runs.num_runs * runs.itemsize


class _Runs(NamedTuple):
    """What ``UnitLayout.runs`` makes of selected units: how many runs, of how many, and the bytes of an index."""

    num_runs: int
    of: int
    itemsize: int


def _runs(layout: UnitLayout, selection: Selection) -> _Runs:
    """Ragged layouts and columns are kept as single elements."""
    if layout.scattered:
        return _Runs(selection.entries, layout.numel, layout.element_dtype.itemsize)
    return _Runs(selection.units, layout.num_units, layout.index_dtype.itemsize)


def own_index_bytes(layout: UnitLayout, selection: Selection, entries: int) -> int:
    """Bytes that say where the ``entries`` of one parameter are that a rank owns."""
    runs = _runs(layout, selection)
    return ceil(runs.num_runs * entries / max(selection.entries, 1)) * runs.itemsize


def all_index_bytes(layout: UnitLayout, selection: Selection, setup: MemorySetup) -> int:
    """Bytes that say, between several ranks, where all entries of one parameter are.

    They are encoded ([Note: gaps] in masks/gaps.py), with two numbers for each chunk of words where a kernel decodes them.
    """
    if setup.world_size == 1:
        return 0
    words = expected_bytes(selection.units, layout.num_units)
    return words + (16 * ceil(words / TILE) if kernel_decodes(layout, setup) else 0)


def overlay_index_bytes(layout: UnitLayout, selection: Selection) -> int:
    """Bytes of the encoded entries of a 4-bit weight's overlay."""
    runs = _runs(layout, selection)
    return expected_bytes(runs.num_runs, runs.of)


def moment_bytes(entries: int, state_dtype: StateDtype) -> int:
    """Bytes of one moment of AdamW for some entries of one parameter."""
    if state_dtype == "8bit":
        return entries + 4 * ceil(entries / QUANTIZATION_BLOCK)
    return entries * (2 if state_dtype == "bfloat16" else 4)
