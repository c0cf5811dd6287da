"""Per-unit reductions over a local slice of a flattened parameter, for the probe.

    unit_sumsq   s[u] = sum over x in unit u of x^2        (importance: update norm, Fisher information)
    unit_dot     s[u] = sum over (x, y) in unit u of x y   (cosine between tasks' updates)

A slice may begin or end inside a unit: its sums of the first and last unit are then partial, and adding the
sums of all ranks by unit id completes them. Units are fixed-order sums: no float atomics, the same bits on
every run.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import ALIGN, TILE, BenchCase, Impl, check_vector, launch, strip_width, use_triton
from .runs import CHUNK

SPLIT = 16 * TILE
"""Elements of one unit that one Triton program sums; longer units are split, then their parts are added."""


def unit_dot_ref(x: Tensor, y: Tensor, block: int, base: int) -> tuple[int, Tensor]:
    """Sums by an explicit unit id for each element, accumulated in float64."""
    unit = (torch.arange(x.numel(), device=x.device) + base) // block
    first, num_units = _touched(x.numel(), block, base)
    sums = torch.zeros(num_units, dtype=torch.float64, device=x.device)
    sums.index_add_(0, unit - first, x.double() * y.double())
    return first, sums.to(_sum_dtype(x, y))


def unit_sumsq_ref(x: Tensor, block: int, base: int) -> tuple[int, Tensor]:
    """`unit_dot_ref` of ``x`` with itself."""
    return unit_dot_ref(x, x, block, base)


@triton.jit
def _unit_dot_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    y_ptr,  # None: y = x
    partials_ptr,  # [num_units, num_splits] fp32
    numel,
    num_units,
    num_splits,
    block,
    lead,  # elements of the first unit left of the slice
    UNITS: tl.constexpr,
    LANES: tl.constexpr,
    SPLIT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    unit = (pid // num_splits) * UNITS + tl.arange(0, UNITS)
    split = pid % num_splits
    start = unit * block - lead
    low = tl.maximum(0, -start)
    high = tl.minimum(block, numel - start)
    if ALIGNED:
        start, low, high = tl.multiple_of(start, 8), tl.multiple_of(low, 8), tl.multiple_of(high, 8)
    total = tl.zeros([UNITS, LANES], dtype=tl.float32)
    for offset in range(0, tl.minimum(block - split * SPLIT, SPLIT), LANES):
        lane = (split * SPLIT + offset + tl.arange(0, LANES))[None, :]
        valid = (lane >= low[:, None]) & (lane < high[:, None])
        x = tl.load(x_ptr + start[:, None] + lane, mask=valid, other=0.0).to(tl.float32)
        if y_ptr is None:
            total += x * x
        else:
            total += x * tl.load(y_ptr + start[:, None] + lane, mask=valid, other=0.0).to(tl.float32)
    tl.store(partials_ptr + unit * num_splits + split, tl.sum(total, axis=1), mask=unit < num_units)


def unit_dot(
    x: Tensor,
    y: Tensor,
    block: int,
    base: int,
    *,
    out_units: Tensor | None = None,
    accumulate: bool = False,
    impl: Impl = "auto",
) -> tuple[int, Tensor]:
    """Dot product of ``x`` and ``y`` within each unit that the slice touches.

    Args:
        x, y: [numel] bf16, fp16, fp32 or fp64 local slices.
        block: elements per unit.
        base: global flat index of local element 0.
        out_units: [units touched] fp32 (fp64 if ``x`` or ``y`` is), written or added to; allocated if None.
        accumulate: add to ``out_units`` instead of overwriting it.
        impl: see dispatch.py.

    Returns:
        Global id of the first unit touched and ``out_units``; an empty slice touches none.
    """
    check_vector("x", x, x.numel())
    check_vector("y", y, x.numel())
    return _reduce(x, y, block, base, out_units, accumulate, impl)


def unit_sumsq(
    x: Tensor,
    block: int,
    base: int,
    *,
    out_units: Tensor | None = None,
    accumulate: bool = False,
    impl: Impl = "auto",
) -> tuple[int, Tensor]:
    """Sum of squares of ``x`` within each unit that the slice touches; arguments as in `unit_dot`."""
    check_vector("x", x, x.numel())
    return _reduce(x, x, block, base, out_units, accumulate, impl)


def bench_case(numel: int, density: float, block: int, dtype: torch.dtype, device: str) -> BenchCase:
    """Sum of squares of a whole parameter; ``density`` plays no part."""
    x = torch.randn(numel, device=device).to(dtype)
    return BenchCase(lambda: unit_sumsq(x, block, 0), x.nbytes + 4 * (numel // block))


def _reduce(
    x: Tensor, y: Tensor, block: int, base: int, out: Tensor | None, accumulate: bool, impl: Impl
) -> tuple[int, Tensor]:
    if block < 1 or base < 0:
        raise ValueError(f"block = {block}, base = {base}: must be at least 1 and 0")
    first, num_units = _touched(x.numel(), block, base)
    dtype = _sum_dtype(x, y)
    if out is not None:
        check_vector("out_units", out, num_units, (dtype,))
    elif accumulate:
        raise ValueError("accumulate = True: needs out_units, the tensor to add to")
    reduce = _dot_triton if use_triton(impl, x, y, *([] if out is None else [out])) else _dot_torch
    sums = reduce(x, y, block, base - first * block, num_units, dtype)
    if out is None:
        return first, sums
    return first, out.add_(sums) if accumulate else out.copy_(sums)


def _touched(numel: int, block: int, base: int) -> tuple[int, int]:
    """Id of the first unit that [base, base + numel) touches, and how many it touches."""
    first = base // block
    return first, -(-(base + numel) // block) - first if numel else 0


def _sum_dtype(x: Tensor, y: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32


def _dot_triton(x: Tensor, y: Tensor, block: int, lead: int, num_units: int, dtype: torch.dtype) -> Tensor:
    if block == 1:  # nothing to reduce
        return x.to(dtype) * y
    num_splits = triton.cdiv(block, SPLIT)
    partials = x.new_empty((num_units, num_splits), dtype=dtype)
    if num_units:
        lanes = strip_width(block)
        tile = {"UNITS": TILE // lanes, "LANES": lanes, "SPLIT": SPLIT}
        aligned = not any(edge % ALIGN for edge in (block, lead, x.numel()))
        num_programs = triton.cdiv(num_units, TILE // lanes) * num_splits
        args = (x, None if y is x else y, partials, x.numel(), num_units, num_splits, block, lead)
        launch(_unit_dot_kernel, num_programs, x.device, *args, **tile, ALIGNED=aligned)
    return partials.view(-1) if num_splits == 1 else partials.sum(dim=1)


def _dot_torch(x: Tensor, y: Tensor, block: int, lead: int, num_units: int, dtype: torch.dtype) -> Tensor:
    sums = x.new_empty(num_units, dtype=dtype)
    for begin, end in _unit_groups(num_units, max(1, CHUNK // block)):
        start, stop = max(0, begin * block - lead), min(x.numel(), end * block - lead)
        if stop - start == (end - begin) * block and block <= CHUNK:
            a = x[start:stop].to(dtype)
            product = a * (a if y is x else y[start:stop])
            sums[begin:end] = product if block == 1 else product.view(-1, block).sum(dim=1)
        else:
            for unit in range(begin, end):
                edges = max(0, unit * block - lead), min(x.numel(), (unit + 1) * block - lead)
                sums[unit] = _dot_stretch(x, y, *edges, dtype)
    return sums


def _unit_groups(num_units: int, size: int) -> Iterator[tuple[int, int]]:
    """[0, num_units) in groups; the first and last unit, which the slice may cut, stay alone."""
    inner = max(1, num_units - 1)
    yield from ([(0, 1)] if num_units else [])
    yield from ((begin, min(begin + size, inner)) for begin in range(1, inner, size))
    yield from ([(num_units - 1, num_units)] if num_units > 1 else [])


def _dot_stretch(x: Tensor, y: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for begin in range(start, stop, CHUNK):
        span = slice(begin, min(begin + CHUNK, stop))
        total += torch.dot(x[span].to(dtype), y[span].to(dtype))
    return total.to(dtype)
