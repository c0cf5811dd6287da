"""Delta swap: exchanges the masked entries of a slice with a compact tensor, in place.

    weight[local(p)], values[p] = values[p], weight[local(p)]

with ``local`` as in runs.py, [Note: compact order]. Applying a task's tuned values and restoring the base
are the same call made twice, and need no second copy of the base. Values are moved as integers, so that NaN
payloads and the sign of zero survive: two calls restore every bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cpu
from .dispatch import BenchCase, Impl, check_vector, choose, launch, locate, plan, run_args
from .runs import Runs

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
    old = tl.load(weight_ptr + local, mask=valid)
    new = tl.load(values_ptr + position, mask=valid)
    tl.store(weight_ptr + local, new, mask=valid)
    tl.store(values_ptr + position, old, mask=valid)


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
    """Swaps of many parameters, again and again: on a CPU in one call, whose arguments are made once; elsewhere one by one.

    Args:
        operands: weight, runs and values of each, as `delta_swap` takes them. They must stay where they are.

    Raises:
        ValueError: as `delta_swap`.
    """

    def __init__(self, operands: Sequence[tuple[Tensor, Runs, Tensor]]) -> None:
        self._operands = list(operands)
        words = [(*_words(*each), each[1]) for each in self._operands]
        self._at_once: cpu.Swaps | None = None
        if all(choose("auto", weight, values, runs.units) == "cpp" for weight, values, runs in words):
            self._at_once = cpu.Swaps([(weight, runs, values) for weight, values, runs in words])

    def run(self) -> None:
        """Swap all of them; twice restores every bit."""
        if self._at_once is not None:
            self._at_once.run()
            return
        for weight, runs, values in self._operands:
            delta_swap(weight, runs, values)


def bench_case(numel: int, density: float, block: int, dtype: torch.dtype, device: str) -> BenchCase:
    """Swap of a random delta."""
    runs = Runs.random(numel, block, density, device=device)
    weight = torch.randn(numel, device=device).to(dtype)
    values = torch.randn(runs.num_entries, device=device).to(dtype)
    return BenchCase(lambda: delta_swap(weight, runs, values), 4 * values.nbytes + runs.units.nbytes)
