"""Compact gather and scatter against explicit indices, on every path."""

from __future__ import annotations

import pytest
import torch
from trace_kernels import Runs, compact_gather, compact_gather_sumsq, compact_scatter
from trace_kernels.compact import compact_gather_ref, compact_scatter_ref
from trace_kernels.dispatch import Impl


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gather_equals_the_reference(
    runs: Runs, impl: Impl, device: str, poisoned, dtype: torch.dtype
) -> None:
    src = torch.randn(runs.numel, device=device).to(dtype)
    out, sumsq = compact_gather_sumsq(src, runs, poisoned(runs.num_entries), scale=0.3, impl=impl)
    expected = compact_gather_ref(src, runs, 0.3)
    assert torch.equal(out, expected)
    assert sumsq.shape == ()
    assert sumsq.dtype == torch.float32
    torch.testing.assert_close(sumsq.double(), expected.double().square().sum(), rtol=1e-5, atol=0)
    again = compact_gather(src, runs, out, scale=-0.7, accumulate=True, impl=impl)
    assert again is out
    assert torch.equal(out, expected + compact_gather_ref(src, runs, -0.7))


def test_gather_keeps_float64(runs: Runs) -> None:
    src = torch.randn(runs.numel, dtype=torch.float64, device=runs.units.device)
    out, sumsq = compact_gather_sumsq(src, runs)
    assert torch.equal(out, src[runs.indices()])
    torch.testing.assert_close(sumsq, out.square().sum(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scatter_equals_the_reference_and_touches_nothing_else(
    runs: Runs, impl: Impl, device: str, poisoned, dtype: torch.dtype
) -> None:
    values = torch.randn(runs.num_entries, device=device)
    dst = torch.randn(runs.numel, device=device).to(dtype)
    expected = dst.clone()
    dst[runs.indices()] = poisoned(runs.num_entries, dtype=dtype)
    compact_scatter(dst, runs, values, impl=impl)
    compact_scatter_ref(expected, runs, values)
    assert torch.equal(dst, expected)


def test_bf16_rounding_edge_cases(impl: Impl, device: str, build_runs) -> None:
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x3FFFFFFF, 0x00000001, -0x80000000, 0x7F800000])
    values = torch.cat([bits.int().view(torch.float32), torch.tensor([float("nan"), 1e-40])]).to(device)
    runs = build_runs((1, values.numel(), 0, values.numel()), "full", device)
    dst = torch.zeros(values.numel(), dtype=torch.bfloat16, device=device)
    compact_scatter(dst, runs, values, impl=impl)
    expected = values.to(torch.bfloat16)
    assert torch.equal(dst.isnan(), expected.isnan())
    assert torch.equal(dst.nan_to_num(7).view(torch.int16), expected.nan_to_num(7).view(torch.int16))


def test_gather_reads_a_view_that_starts_off_alignment(impl: Impl, device: str, build_runs) -> None:
    runs = build_runs((64, 8192, 0, 8192), "some", device)
    storage = torch.randn(8195, device=device).bfloat16()
    assert torch.equal(compact_gather(storage[3:], runs, impl=impl), compact_gather_ref(storage[3:], runs))
    values = torch.randn(runs.num_entries + 1, device=device).bfloat16()[1:]
    compact_scatter(storage[3:], runs, values, impl=impl)
    assert torch.equal(storage[3:][runs.indices()], values)


@pytest.mark.parametrize(
    ("src", "out", "match"),
    [
        (torch.zeros(9), None, r"src: shape \(9,\), must be \(8,\)"),
        (torch.zeros(16)[::2], None, "contiguous"),
        (torch.zeros(8, dtype=torch.int32), None, "dtype"),
        (torch.zeros(8), torch.zeros(8, dtype=torch.bfloat16), "out: dtype"),
    ],
)
def test_gather_refuses(src: torch.Tensor, out: torch.Tensor | None, match: str) -> None:
    runs = Runs.clip(torch.arange(8), 1, 0, 8, 8)
    with pytest.raises(ValueError, match=match):
        compact_gather(src, runs, out)


def test_accumulate_needs_an_out() -> None:
    with pytest.raises(ValueError, match="needs out"):
        compact_gather(torch.zeros(8), Runs.clip(torch.arange(8), 1, 0, 8, 8), accumulate=True)
