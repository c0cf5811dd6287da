"""Per-unit sums against an explicit unit id per element; ranks' partial sums add up to the whole."""

from __future__ import annotations

import pytest
import torch
from trace_kernels import unit_dot, unit_sumsq
from trace_kernels.dispatch import Impl
from trace_kernels.unit_reduce import unit_dot_ref, unit_sumsq_ref

SLICES = [(1, 0, 100), (1, 7, 3000), (3, 10, 500), (16, 0, 4096), (16, 5, 1001), (64, 64 * 3 + 8, 4000)]
SLICES += [(64, 37, 2), (576, 1000, 5000), (40_000, 3, 90_001), (100_000, 0, 100_000), (64, 2**33 + 8, 640)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("block", "base", "numel"), SLICES)
def test_equals_the_reference(
    impl: Impl, device: str, poisoned, block: int, base: int, numel: int, dtype: torch.dtype
) -> None:
    x, y = torch.randn(2, numel, device=device).to(dtype).unbind()
    first, expected = unit_dot_ref(x, y, block, base)
    out = poisoned(expected.numel())
    got_first, got = unit_dot(x, y, block, base, out_units=out, impl=impl)
    assert got is out
    assert got_first == first == base // block
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * min(block, numel) ** 0.5)
    first, expected = unit_sumsq_ref(x, block, base)
    torch.testing.assert_close(unit_sumsq(x, block, base, impl=impl), (first, expected), rtol=1e-5, atol=0)
    unit_sumsq(x, block, base, out_units=out, accumulate=True, impl=impl)
    torch.testing.assert_close(out, got + 0, rtol=0, atol=0)
    torch.testing.assert_close(out, unit_dot_ref(x, y, block, base)[1] + expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("block", [1, 16, 100])
def test_ranks_add_up(impl: Impl, device: str, block: int) -> None:
    x = torch.randn(1200, device=device)
    total = torch.zeros(1200 // block, device=device)
    for start, stop in ((0, 333), (333, 340), (340, 340), (340, 1200)):
        first, sums = unit_sumsq(x[start:stop].clone(), block, start, impl=impl)
        total[first : first + sums.numel()] += sums
    torch.testing.assert_close(total, x.square().view(-1, block).sum(1))


def test_float64_is_summed_in_float64() -> None:
    x = torch.randn(5000, dtype=torch.float64)
    torch.testing.assert_close(unit_sumsq(x, 64, 13), unit_sumsq_ref(x, 64, 13), rtol=1e-14, atol=0)


def test_same_bits_on_every_run(impl: Impl, device: str) -> None:
    x = torch.randn(50_000, device=device)
    first, again = (unit_sumsq(x, 20_000, 11, impl=impl)[1] for _ in range(2))
    assert torch.equal(first, again)


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"y: shape \(4,\)"):
        unit_dot(torch.zeros(5), torch.zeros(4), 1, 0)
    with pytest.raises(ValueError, match="out_units"):
        unit_sumsq(torch.zeros(5), 2, 1, out_units=torch.zeros(2))
    with pytest.raises(ValueError, match="block = 0"):
        unit_sumsq(torch.zeros(5), 0, 1)
