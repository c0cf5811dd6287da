"""Blockwise dynamic quantisation: a compact fp32 vector as one byte per entry and one scale per 256 entries.

    absmax[b] = max_p |x[p]|                                 over the 256 compact positions p of block b
    codes[p]  = argmin_c |x[p] / absmax[p // 256] - values[c]|                  the lower code at a tie
    x[p]      = values[codes[p]] * absmax[p // 256]

(Dettmers et al. 2022, arXiv 2110.02861, section 2.) ``values`` is the dynamic map, signed or unsigned. Map,
codes and block size are those of bitsandbytes, with which states can be exchanged.

[Note: nearest code]
A code is found by two table look-ups instead of a binary search of eight: between an fp32 number cut to its
upper 16 bits and the next such number lies at most one midpoint of the map. ``guess`` holds the code of the
smallest number with given upper bits; one comparison tells whether the next code is nearer. Every path finds
the same, exactly nearest code. The CPU quantiser of bitsandbytes 0.50 is not used: it first rounds its
argument to a coarse table, so that 3 % of the codes of squared normal numbers are not the nearest and a value
of 1e-7 of its block's largest is read back more than 100 times too large; it also turns a block of NaN into
zeros. Here a value that is not finite leaves its block not finite.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import check_vector
from .runs import CHUNK

BLOCK_SIZE = 256
"""Compact positions that share one absmax."""


class Blockwise(NamedTuple):
    """A quantised compact vector of n entries."""

    codes: Tensor
    """[n] uint8, indices into the dynamic map."""
    absmax: Tensor
    """[ceil(n / 256)] fp32, the largest magnitude in each block of 256 compact positions."""

    @classmethod
    def zeros(cls, num_entries: int, device: torch.device | str = "cpu") -> Blockwise:
        """All zeros in either map, as bitsandbytes begins: every byte of codes and absmax is zero."""
        absmax = torch.zeros(triton.cdiv(num_entries, BLOCK_SIZE), device=device)
        return cls(absmax.new_zeros(num_entries, dtype=torch.uint8), absmax)


class Codebook(NamedTuple):
    """The dynamic map and what finds the nearest code in it ([Note: nearest code])."""

    values: Tensor
    """[256] fp32, sorted."""
    midpoints: Tensor
    """[256] fp32, between each value and the next; the last is infinite."""
    guess: Tensor
    """[65536] uint8, by the upper 16 bits of an fp32 number."""


@functools.lru_cache(maxsize=16)
def codebook(signed: bool, device: torch.device) -> Codebook:
    """The tables on ``device``; bit for bit ``bitsandbytes.functional.create_dynamic_map``."""
    decades = []
    for exponent in range(-6, 1):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + (6 if signed else 7)) + 1)
        decades.append(10.0**exponent * ((edges[:-1] + edges[1:]) / 2))
    positive = torch.cat(decades)
    ends = torch.tensor([0.0, 1.0])
    values = torch.cat([-positive, positive, ends] if signed else [positive, ends]).sort().values
    midpoints = F.pad((values[:-1] + values[1:]) / 2, (0, 1), value=math.inf)
    upper = torch.arange(1 << 16) << 16
    smallest = torch.where(upper < 1 << 31, upper, upper | 0xFFFF).to(torch.int32).view(torch.float32)
    guess = torch.bucketize(smallest, midpoints).clamp_(max=255).to(torch.uint8)
    return Codebook(values.to(device), midpoints.to(device), guess.to(device))


def quantize_blockwise_ref(values: Tensor, signed: bool) -> Blockwise:
    """The formula by comparison with all 256 values, in float64."""
    levels = codebook(signed, values.device).values.double()
    table = F.pad(values.double(), (0, -values.numel() % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    absmax = table.abs().amax(dim=1)
    scaled = (table / absmax.where(absmax > 0, 1.0)[:, None]).view(-1, 1)[: values.numel()]
    return Blockwise((scaled - levels).abs().argmin(dim=1).to(torch.uint8), absmax.float())


@triton.jit
def load_blockwise(codes_ptr, absmax_ptr, values_ptr, position, valid, blocks, blocks_valid):  # type: ignore[no-untyped-def]
    """The fp32 values of whole blocks: at compact positions ``position`` of the blocks ``blocks``, both 1-D."""
    code = tl.load(codes_ptr + position, mask=valid, other=0).to(tl.int32)
    absmax = tl.load(absmax_ptr + blocks, mask=blocks_valid, other=0.0)
    return tl.load(values_ptr + code) * _per_entry(absmax, position)


@triton.jit
def store_blockwise(  # type: ignore[no-untyped-def]
    x, codes_ptr, absmax_ptr, midpoints_ptr, guess_ptr, position, valid, blocks, blocks_valid
):
    """Quantises fp32 ``x`` at the positions of `load_blockwise`."""
    # as an integer NaN is the largest magnitude, so that it is not lost
    magnitude = tl.where(valid, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    magnitude = tl.reshape(magnitude, (blocks.shape[0], x.shape[0] // blocks.shape[0]))
    absmax = tl.max(magnitude, axis=1).to(tl.float32, bitcast=True)
    tl.store(absmax_ptr + blocks, absmax, mask=blocks_valid)
    scaled = tl.div_rn(x, _per_entry(tl.where(absmax == 0, 1.0, absmax), position))
    code = tl.load(guess_ptr + (scaled.to(tl.uint32, bitcast=True) >> 16).to(tl.int32)).to(tl.int32)
    code += (scaled > tl.load(midpoints_ptr + code)).to(tl.int32)
    tl.store(codes_ptr + position, code.to(tl.uint8), mask=valid)


@triton.jit
def _per_entry(x, position):  # type: ignore[no-untyped-def]
    """One number per block to one per entry."""
    table = tl.broadcast_to(x[:, None], (x.shape[0], position.shape[0] // x.shape[0]))
    return tl.reshape(table, (position.shape[0],))


def quantize_blockwise(values: Tensor, signed: bool, out: Blockwise | None = None) -> Blockwise:
    """Quantises a compact vector.

    Args:
        values: [n] fp32. A NaN or infinity makes its block of 256 not finite.
        signed: which of the two maps; the unsigned one stores a negative value as zero.
        out: n entries, overwritten; allocated if None.

    Returns:
        ``out``.
    """
    check_vector("values", values, values.numel(), (torch.float32,))
    out = Blockwise.zeros(values.numel(), values.device) if out is None else out
    check_blockwise("out", out, values.numel())
    tables = codebook(signed, values.device)
    for start in range(0, values.numel(), CHUNK):
        chunk = values[start : start + CHUNK]
        table = F.pad(chunk, (0, -chunk.numel() % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
        absmax = out.absmax[start // BLOCK_SIZE :][: len(table)]
        torch.amax(table.abs(), dim=1, out=absmax)
        scaled = (table / absmax.where(absmax != 0, 1.0)[:, None]).view(-1)[: chunk.numel()]
        codes = tables.guess.index_select(0, (scaled.view(torch.int32) >> 16).bitwise_and_(0xFFFF))
        codes += scaled > tables.midpoints.index_select(0, codes.int())
        out.codes[start : start + CHUNK] = codes
    return out


def dequantize_blockwise(state: Blockwise, signed: bool) -> Tensor:
    """Returns the fp32 values [n] of ``state``; ``signed`` names the map it was quantised with."""
    check_blockwise("state", state, state.codes.numel())
    levels = codebook(signed, state.codes.device).values
    values = state.absmax.new_empty(state.codes.numel())
    for start in range(0, values.numel(), CHUNK):
        chunk = values[start : start + CHUNK]
        torch.index_select(levels, 0, state.codes[start : start + CHUNK].int(), out=chunk)
        absmax = state.absmax[start // BLOCK_SIZE : (start + CHUNK) // BLOCK_SIZE]
        whole = chunk.numel() // BLOCK_SIZE
        chunk[: whole * BLOCK_SIZE].view(whole, BLOCK_SIZE).mul_(absmax[:whole, None])
        chunk[whole * BLOCK_SIZE :].mul_(absmax[whole:])
    return values


def check_blockwise(name: str, state: Blockwise, num_entries: int) -> None:
    """Raises ValueError unless ``state`` has ``num_entries`` codes and a scale for each block."""
    check_vector(f"{name}.codes", state.codes, num_entries, (torch.uint8,))
    num_blocks = triton.cdiv(num_entries, BLOCK_SIZE)
    check_vector(f"{name}.absmax", state.absmax, num_blocks, (torch.float32,))
