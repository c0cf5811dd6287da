"""Compact gather and scatter: between a local slice and one value per support entry.

    gather   out[p]          (+)= scale * src[local(p)]      and, on demand, sum_p out[p]^2
    scatter  dst[local(p)]    =  round(values[p])            every other element keeps its bits
    sumsq    sum_p values[p]^2, in float64

with ``local`` as in runs.py, [Note: compact order]. The sum of squares feeds the global clip norm. It is
reduced per tile, then over tiles, without float atomics: the same bits on every run, and in C++ on any number of
threads. Values gathered and scattered have the same bits on every path.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cpu
from .dispatch import BenchCase, Impl, check_vector, choose, launch, locate, plan, run_args
from .rounding import round_bf16
from .runs import CHUNK, Runs


def compact_gather_ref(src: Tensor, runs: Runs, scale: float = 1.0) -> Tensor:
    """Gather by explicit indices: [num_entries] fp32, or fp64 for an fp64 ``src``."""
    return src[runs.indices()].to(_out_dtype(src)) * scale


def compact_scatter_ref(dst: Tensor, runs: Runs, values: Tensor) -> None:
    """Scatter by explicit indices."""
    dst[runs.indices()] = values.to(dst.dtype)


@triton.jit
def _compact_gather_kernel(  # type: ignore[no-untyped-def]
    src_ptr,
    out_ptr,
    sumsq_ptr,  # [num_programs] fp32, or None where no sum is wanted
    scale,
    units_ptr,
    num_units,
    num_entries,
    block,
    base,
    skip,
    ACCUMULATE: tl.constexpr,
    UNITS: tl.constexpr,
    LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    local, position, valid = locate(
        units_ptr, num_units, num_entries, block, base, skip, UNITS, LANES, ALIGNED
    )
    value = tl.load(src_ptr + local, mask=valid, other=0.0).to(tl.float32) * scale
    if ACCUMULATE:
        value += tl.load(out_ptr + position, mask=valid, other=0.0)
    tl.store(out_ptr + position, value, mask=valid)
    if sumsq_ptr is not None:
        square = tl.where(valid, value * value, 0.0)
        tl.store(sumsq_ptr + tl.program_id(0), tl.sum(square))


@triton.jit
def _compact_scatter_kernel(  # type: ignore[no-untyped-def]
    dst_ptr,
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
    value = tl.load(values_ptr + position, mask=valid, other=0.0)
    if dst_ptr.dtype.element_ty == tl.bfloat16 and value.dtype != tl.bfloat16:
        value = round_bf16(value.to(tl.float32))
    tl.store(dst_ptr + local, value, mask=valid)


def compact_gather(
    src: Tensor,
    runs: Runs,
    out: Tensor | None = None,
    *,
    scale: float = 1.0,
    accumulate: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Picks the masked entries out of a local slice.

    Args:
        src: [numel] bf16, fp16, fp32 or fp64.
        runs: the support.
        out: [num_entries] fp32 (fp64 for an fp64 ``src``), written or added to; allocated if None.
        scale: factor on ``src``.
        accumulate: add to ``out`` instead of overwriting it.
        impl: see dispatch.py.

    Returns:
        ``out``.
    """
    out = _check_gather(src, runs, out, accumulate)
    path = choose(impl, src, out, runs.units)
    if path == "cpp":
        cpu.gather(src, runs, out, scale, accumulate)
    elif path == "torch":
        _gather_torch(src, runs, out, scale, accumulate)
    elif runs.num_entries:
        num_programs, tile = plan(runs)
        args = (src, out, None, float(scale), *run_args(runs))
        launch(_compact_gather_kernel, num_programs, src.device, *args, ACCUMULATE=accumulate, **tile)
    return out


def compact_gather_sumsq(
    src: Tensor,
    runs: Runs,
    out: Tensor | None = None,
    *,
    scale: float = 1.0,
    accumulate: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """`compact_gather` in one pass with the sum of squares of the values written.

    Returns:
        ``out`` and its sum of squares, 0-dim, of the dtype of ``out``.
    """
    out = _check_gather(src, runs, out, accumulate)
    path = choose(impl, src, out, runs.units)
    if path == "cpp":
        return out, cpu.gather(src, runs, out, scale, accumulate, sumsq=True).to(out.dtype)
    if path == "torch":
        return out, _gather_torch(src, runs, out, scale, accumulate, sumsq=True)
    if runs.num_entries == 0:
        return out, out.new_zeros(())
    num_programs, tile = plan(runs)
    partials = out.new_empty(num_programs)
    args = (src, out, partials, float(scale), *run_args(runs))
    launch(_compact_gather_kernel, num_programs, src.device, *args, ACCUMULATE=accumulate, **tile)
    return out, partials.sum(dtype=torch.float64).to(out.dtype)


def compact_scatter(dst: Tensor, runs: Runs, values: Tensor, *, impl: Impl = "auto") -> None:
    """Writes compact values to the masked entries of a local slice, in place, rounded to nearest.

    Args:
        dst: [numel] bf16, fp16, fp32 or fp64.
        runs: the support.
        values: [num_entries] of any float dtype.
        impl: see dispatch.py.
    """
    check_vector("dst", dst, runs.numel)
    check_vector("values", values, runs.num_entries)
    path = choose(impl, dst, values, runs.units)
    if path == "cpp":
        cpu.scatter(dst, runs, values)
    elif path == "torch":
        for piece in runs.pieces():
            piece.scatter(dst, values[piece.start : piece.stop].to(dst.dtype))
    elif runs.num_entries:
        num_programs, tile = plan(runs)
        launch(_compact_scatter_kernel, num_programs, dst.device, dst, values, *run_args(runs), **tile)


def compact_sumsq(values: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Sum of squares in float64, without a float64 copy; of the accumulated gradients, for the global clip norm.

    Args:
        values: [n] bf16, fp16, fp32 or fp64.
        impl: see dispatch.py; the op has no Triton kernel, a GPU tensor is reduced by torch.

    Returns:
        0-dim float64, on the device of ``values``.
    """
    check_vector("values", values, values.numel())
    if not values.is_cuda and choose(impl, values) == "cpp":
        return cpu.sumsq(values)
    if values.is_cuda:
        return torch.linalg.vector_norm(values, dtype=torch.float64).square()
    squares = [chunk.double().square().sum() for chunk in values.split(CHUNK)]
    return torch.stack(squares).sum()


def bench_case(numel: int, density: float, block: int, dtype: torch.dtype, device: str) -> BenchCase:
    """Gather of a random support with its sum of squares."""
    runs = Runs.random(numel, block, density, device=device)
    src = torch.randn(numel, device=device).to(dtype)
    out = torch.empty(runs.num_entries, device=device)
    num_bytes = runs.num_entries * (src.element_size() + out.element_size()) + runs.units.nbytes
    return BenchCase(lambda: compact_gather_sumsq(src, runs, out), num_bytes)


def _out_dtype(src: Tensor) -> torch.dtype:
    return torch.float64 if src.dtype == torch.float64 else torch.float32


def _check_gather(src: Tensor, runs: Runs, out: Tensor | None, accumulate: bool) -> Tensor:
    check_vector("src", src, runs.numel)
    if out is None:
        if accumulate:
            raise ValueError("accumulate = True: needs out, the tensor to add to")
        return src.new_empty(runs.num_entries, dtype=_out_dtype(src))
    check_vector("out", out, runs.num_entries, (_out_dtype(src),))
    return out


def _gather_torch(
    src: Tensor, runs: Runs, out: Tensor, scale: float, accumulate: bool, sumsq: bool = False
) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=out.device)
    for piece in runs.pieces():
        target = out[piece.start : piece.stop]
        value = piece.gather(src)
        if scale != 1.0:
            value = value.to(out.dtype) * scale
        if accumulate:
            target.add_(value)
        else:
            target.copy_(value)
        if sumsq:
            total += torch.dot(target, target)
    return total.to(out.dtype)
