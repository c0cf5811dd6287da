"""Blockwise quantisation against bitsandbytes, whose format it is, and against comparison with all 256 values."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor
from trace_kernels.blockwise import (
    BLOCK_SIZE,
    Blockwise,
    codebook,
    dequantize_blockwise,
    quantize_blockwise,
    quantize_blockwise_ref,
)

CPU = torch.device("cpu")


def log_uniform(n: int, signed: bool) -> Tensor:
    """Magnitudes over nine decades: more than the map covers."""
    values = 10 ** (-9 * torch.rand(n))
    return values * torch.randn(n).sign() if signed else values


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_that_of_bitsandbytes(signed: bool) -> None:
    assert torch.equal(codebook(signed, CPU).values, bnb.create_dynamic_map(signed))


@pytest.mark.parametrize("signed", [True, False])
def test_at_most_one_midpoint_between_numbers_cut_to_16_bits(signed: bool) -> None:
    """Else one comparison could not correct the guess."""
    upper = torch.arange(1 << 16, dtype=torch.int32) << 16
    ends = torch.stack([upper, upper | 0xFFFF]).view(torch.float32)
    finite = ends.isfinite().all(0)
    below = torch.bucketize(ends[:, finite], codebook(signed, CPU).midpoints)
    assert int((below[0] - below[1]).abs().max()) == 1


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, (1 << 16) + 700])
def test_every_code_is_the_nearest(n: int, signed: bool) -> None:
    values = log_uniform(n, signed)
    ours = quantize_blockwise(values, signed)
    if n == 0:
        assert ours.codes.numel() == ours.absmax.numel() == 0
        return
    expected = quantize_blockwise_ref(values, signed)
    assert torch.equal(ours.absmax, expected.absmax)
    # the quotient is rounded to fp32 first, which may move it across a midpoint
    off = (ours.codes.int() - expected.codes.int()).abs()
    assert int(off.max()) <= 1
    assert int(off.sum()) <= 1e-4 * n


@pytest.mark.parametrize("signed", [True, False])
def test_ties_take_the_lower_code(signed: bool) -> None:
    midpoints = codebook(signed, CPU).midpoints[:-1]
    scale_one = torch.cat([torch.ones(1), midpoints])
    assert quantize_blockwise(scale_one, signed).codes[1:].tolist() == list(range(255))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("n", [1, 257, (1 << 16) + 700])
def test_reads_the_states_of_bitsandbytes(n: int, signed: bool) -> None:
    values, table = log_uniform(n, signed), bnb.create_dynamic_map(signed)
    theirs = torch.ops.bitsandbytes.quantize_blockwise(values, table, BLOCK_SIZE)
    expected = torch.ops.bitsandbytes.dequantize_blockwise(*theirs, table, BLOCK_SIZE, torch.float32)
    assert torch.equal(dequantize_blockwise(Blockwise(*theirs), signed), expected)
    ours = dequantize_blockwise(quantize_blockwise(values, signed), signed)
    assert float((ours - values).abs().sum()) <= float((expected - values).abs().sum())


@pytest.mark.parametrize("signed", [True, False])
def test_zeros_stay_exact_and_nan_stays_in_its_block(signed: bool) -> None:
    values = torch.zeros(3 * BLOCK_SIZE)
    values[BLOCK_SIZE + 7] = float("nan")
    values[2 * BLOCK_SIZE] = 1e-42  # subnormal
    back = dequantize_blockwise(quantize_blockwise(values, signed), signed)
    assert torch.equal(back[:BLOCK_SIZE], values[:BLOCK_SIZE])
    assert bool(back[BLOCK_SIZE : 2 * BLOCK_SIZE].isnan().all())
    assert torch.equal(back[2 * BLOCK_SIZE :], values[2 * BLOCK_SIZE :])
    assert torch.equal(dequantize_blockwise(Blockwise.zeros(300), signed), torch.zeros(300))


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"values: dtype torch\.float64"):
        quantize_blockwise(torch.zeros(3, dtype=torch.float64), True)
    with pytest.raises(ValueError, match=r"out\.codes: shape \(4,\)"):
        quantize_blockwise(torch.zeros(3), True, out=Blockwise.zeros(4))
    with pytest.raises(ValueError, match=r"state\.absmax: shape \(1,\), must be \(2,\)"):
        dequantize_blockwise(Blockwise(torch.zeros(257, dtype=torch.uint8), torch.zeros(1)), True)
