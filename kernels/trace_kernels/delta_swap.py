"""Delta swap: exchanges the masked entries of a slice with a compact tensor, in place.

    weight[local(p)], values[p] = values[p], weight[local(p)]

with ``local`` as in runs.py, [Note: compact order]. Applying a task's tuned values and restoring the base
are the same call made twice, and need no second copy of the base. Values are moved as integers, so that NaN
payloads and the sign of zero survive: two calls restore every bit.

Who keeps the base's values too need not read what is overwritten: `DeltaSwapBatch.write` only writes, which is half of the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cpu
from .dispatch import BenchCase, Impl, check_vector, choose, launch, locate, locate_program, plan, run_args
from .runs import Runs
from .table import TYPES, pointer, tables, tile_of

_FIELDS = 8
"""Columns of a batch's table: weight, values, unit ids, their number, entries, base, skip, first program."""
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def delta_swap_ref(weight: Tensor, runs: Runs, values: Tensor) -> None:
    """Swap by explicit indices."""
    indices = runs.indices()
    old = weight[indices]
    weight[indices] = values
    values.copy_(old)


@triton.jit
def _delta_swap_kernel(  # type: ignore[no-untyped-def]
    weight_ptr,
    values_ptr,
    units_ptr,
    num_units,
    num_entries,
    block,
    base,
    skip,
    UNITS: tl.constexpr,
    LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    local, position, valid = locate(
        units_ptr, num_units, num_entries, block, base, skip, UNITS, LANES, ALIGNED
    )
    _exchange(weight_ptr, values_ptr, local, position, valid)


@triton.jit
def _exchange(weight_ptr, values_ptr, local, position, valid):  # type: ignore[no-untyped-def]
    old = tl.load(weight_ptr + local, mask=valid)
    new = tl.load(values_ptr + position, mask=valid)
    tl.store(weight_ptr + local, new, mask=valid)
    tl.store(values_ptr + position, old, mask=valid)


@triton.jit
def _delta_swap_batch_kernel(  # type: ignore[no-untyped-def]
    table_ptr,
    owner_ptr,
    block,
    FIELDS: tl.constexpr,
    WORD: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS: tl.constexpr,
    LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    row = table_ptr + tl.load(owner_ptr + pid).to(tl.int64) * FIELDS
    weight_ptr, values_ptr = pointer(row, 0, WORD, ALIGNED), pointer(row, 1, WORD, ALIGNED)
    units_ptr = pointer(row, 2, UNIT, False)
    num_units, num_entries = tl.load(row + 3), tl.load(row + 4)
    base, skip = tl.load(row + 5), tl.load(row + 6)
    if ALIGNED:
        base, skip = tl.multiple_of(base, 8), tl.multiple_of(skip, 8)
    local, position, valid = locate_program(
        pid - tl.load(row + 7), units_ptr, num_units, num_entries, block, base, skip, UNITS, LANES, ALIGNED
    )
    _exchange(weight_ptr, values_ptr, local, position, valid)


def delta_swap(weight: Tensor, runs: Runs, values: Tensor, *, impl: Impl = "auto") -> None:
    """Exchanges masked weight entries and ``values``; calling it twice restores both bit for bit.

    Args:
        weight: [numel] bf16, fp16, fp32 or fp64, changed at the support only.
        runs: the support.
        values: [num_entries], of the dtype of ``weight``.
        impl: see dispatch.py.
    """
    weight, values = _words(weight, runs, values)
    path = choose(impl, weight, values, runs.units)
    if path == "cpp":
        cpu.Swaps([(weight, runs, values)]).run()
    elif path == "torch":
        for piece in runs.pieces():
            target = values[piece.start : piece.stop]
            old = piece.gather(weight).clone()
            piece.scatter(weight, target)
            target.copy_(old)
    elif runs.num_entries:
        num_programs, tile = plan(runs)
        launch(_delta_swap_kernel, num_programs, weight.device, weight, values, *run_args(runs), **tile)


def _words(weight: Tensor, runs: Runs, values: Tensor) -> tuple[Tensor, Tensor]:
    """Both as integers."""
    check_vector("weight", weight, runs.numel)
    check_vector("values", values, runs.num_entries, (weight.dtype,))
    word = _WORDS[weight.element_size()]
    return weight.view(word), values.view(word)


class DeltaSwapBatch:
    """Swaps of many parameters, again and again, in one call on a CPU and a few launches on a GPU, whose arguments are made once.

    Args:
        operands: weight, runs and values of each, as `delta_swap` takes them. They must stay where they are.
        impl: see dispatch.py.

    Raises:
        ValueError: as `delta_swap`.
    """

    def __init__(self, operands: Sequence[tuple[Tensor, Runs, Tensor]], impl: Impl = "auto") -> None:
        self._operands, self._impl = list(operands), impl
        words: list[_Words] = []
        for weight, runs, values in self._operands:
            words.append((*_words(weight, runs, values), runs))
        self._words = words
        self._at_once: list[cpu.Swaps | _Launch] = []
        paths = {choose(impl, weight, values, runs.units) for weight, values, runs in words}
        if paths == {"cpp"}:
            self._at_once = [cpu.Swaps([(weight, runs, values) for weight, values, runs in words])]
        elif paths == {"triton"}:
            kinds: dict[tuple[Any, ...], list[_Words]] = {}
            for each in words:
                if each[2].num_entries:
                    kinds.setdefault(_kind(*each), []).append(each)
            self._at_once = [_Launch(kind, members) for kind, members in kinds.items()]
        self._one_by_one = not paths <= {"cpp", "triton"} or len(paths) > 1

    def run(self) -> None:
        """Swap all of them; twice restores every bit."""
        for each in self._at_once:
            each.run()
        if self._one_by_one:
            for weight, runs, values in self._operands:
                delta_swap(weight, runs, values, impl=self._impl)

    def write(self) -> None:
        """Write the values into the weights; what was there is lost, and the values stay as they are."""
        for each in self._at_once:
            if isinstance(each, cpu.Swaps):
                each.write()
                return
        for weight, values, runs in self._words:
            for piece in runs.pieces():
                piece.scatter(weight, values[piece.start : piece.stop])


_Words = tuple[Tensor, Tensor, Runs]
"""Weight and values as integers, and the support."""


def _kind(weight: Tensor, values: Tensor, runs: Runs) -> tuple[Any, ...]:
    """What parameters must share to share a launch."""
    return weight.dtype, runs.units.dtype, runs.block, tile_of(runs, (weight, values))


class _Launch:
    """The parameters of one kind ([Note: table] in table.py)."""

    def __init__(self, kind: tuple[Any, ...], members: Sequence[_Words]) -> None:
        word, unit, self._block, tile = kind
        self._constexprs = {"WORD": TYPES[word], "UNIT": TYPES[unit], **dict(tile)}
        self._members = list(members)  # keeps what the table points to
        self._device = members[0][0].device
        addresses = [[t.data_ptr() for t in (weight, values, runs.units)] for weight, values, runs in members]
        self._tables = tables(addresses, [runs for *_, runs in members], [[]] * len(members), self._device)

    def run(self) -> None:
        """One launch."""
        arguments = (*self._tables, self._block)
        num_programs = len(self._tables.owners)
        launch(
            _delta_swap_batch_kernel,
            num_programs,
            self._device,
            *arguments,
            FIELDS=_FIELDS,
            **self._constexprs,
        )


def bench_case(numel: int, density: float, block: int, dtype: torch.dtype, device: str) -> BenchCase:
    """Swap of a random delta."""
    runs = Runs.random(numel, block, density, device=device)
    weight = torch.randn(numel, device=device).to(dtype)
    values = torch.randn(runs.num_entries, device=device).to(dtype)
    return BenchCase(lambda: delta_swap(weight, runs, values), 4 * values.nbytes + runs.units.nbytes)
