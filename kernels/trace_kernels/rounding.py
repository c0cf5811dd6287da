"""Rounding fp32 to bf16, to nearest and stochastically, with the same bits on every device and world size.

bf16 is the upper half of fp32, so both are "add to the lower half, then truncate"::

    nearest     bits + 0x7fff + (bits >> 16 & 1)     ties to even
    stochastic  bits + r,  r uniform in [0, 2^16)    E[round(x)] = x

(stochastic rounding: Gupta et al. 2015, arXiv 1502.02551, section 3).

``r`` is half of a hash of (seed, global index of the entry): the lower half for a weight, the upper one for a
second moment, which may be rounded in the same step. The hash is two rounds of the 32-bit finaliser
"lowbias32" of C. Wellons' hash prospector. It is counter-based like Philox, with 4 multiplications against 20,
and since it does not depend on where a shard begins, a run gives the same weights on any number of ranks. NaN
and infinity pass through.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOW_HALF = 0xFFFF
_MIX_1, _MIX_2 = 0x7FEB352D, 0x846CA68B - (1 << 32)  # the second as a signed 32-bit integer


def seed_keys(seed: int) -> tuple[int, int]:
    """Two signed 32-bit keys from a 64-bit seed by a step of SplitMix64: near seeds give unrelated keys."""
    word = (seed + 0x9E3779B97F4A7C15) & (2**64 - 1)
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    word = (word ^ word >> 27) * 0x94D049BB133111EB & (2**64 - 1)
    word ^= word >> 31
    return _signed32(word & 0xFFFFFFFF), _signed32(word >> 32)


def stochastic_bf16_ref(x: Tensor, indices: Tensor, seed: int, upper: bool = False) -> Tensor:
    """Plain Python-integer version of `stochastic_bf16`: slow, one entry at a time."""

    def mix(word: int) -> int:
        word = (word ^ word >> 16) * 0x7FEB352D & 0xFFFFFFFF
        word = (word ^ word >> 15) * 0x846CA68B & 0xFFFFFFFF
        return word ^ word >> 16

    keys = [key & 0xFFFFFFFF for key in seed_keys(seed)]
    out = torch.empty_like(x)
    for i, (bits, index) in enumerate(zip(x.view(torch.int32).tolist(), indices.tolist(), strict=True)):
        word = mix(mix(index & 0xFFFFFFFF ^ keys[0]) ^ index >> 32 ^ keys[1])
        noise = word >> 16 if upper else word & _LOW_HALF
        out.view(torch.int32)[i] = (bits + noise if bool(x[i].isfinite()) else bits) & ~_LOW_HALF
    return out.to(torch.bfloat16)


def stochastic_bf16(x: Tensor, indices: Tensor, seed: int, upper: bool = False) -> Tensor:
    """Rounds fp32 ``x`` [n] to bf16 at random, without bias.

    Args:
        x: [n] fp32.
        indices: [n] int64, the global flat index of each entry in its parameter.
        seed: any int; use another one for each parameter and step.
        upper: take the other half of the hash, for a second number of the same entry.
    """
    key_1, key_2 = seed_keys(seed)
    noise = _mix(indices.to(torch.int32).bitwise_xor_(key_1))
    noise = _mix(noise.bitwise_xor_((indices >> 32).to(torch.int32)).bitwise_xor_(key_2))
    if upper:
        noise >>= 16
    noise.bitwise_and_(_LOW_HALF).masked_fill_(~x.isfinite(), 0)
    return noise.add_(x.view(torch.int32)).bitwise_and_(~_LOW_HALF).view(torch.float32).to(torch.bfloat16)


@triton.jit
def seed_keys_kernel(seed):  # type: ignore[no-untyped-def]
    """`seed_keys` of an int64 seed, on the device."""
    word = seed.to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB
    word = word ^ (word >> 31)
    return word.to(tl.uint32), (word >> 32).to(tl.uint32)


@triton.jit
def random_word(index, key_1, key_2):  # type: ignore[no-untyped-def]
    """32 random bits (as uint32) for each int64 global index."""
    word = _mix_kernel(index.to(tl.uint32) ^ key_1.to(tl.uint32))
    return _mix_kernel(word ^ (index >> 32).to(tl.uint32) ^ key_2.to(tl.uint32))


@triton.jit
def truncate_bf16(x, noise):  # type: ignore[no-untyped-def]
    """fp32 ``x`` plus uint32 ``noise`` in its low bits, cut to bf16. Integer ops: the interpreter agrees."""
    bits = x.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    quiet = (bits >> 16) | tl.where((bits & 0x7FFFFF) != 0, 0x40, 0)
    high = tl.where(finite, (bits + noise) >> 16, quiet)
    return high.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def round_bf16(x):  # type: ignore[no-untyped-def]
    """fp32 ``x`` to the nearest bf16, ties to even; a plain cast, which the interpreter would truncate."""
    return truncate_bf16(x, 0x7FFF + ((x.to(tl.uint32, bitcast=True) >> 16) & 1))


@triton.jit
def _mix_kernel(word):  # type: ignore[no-untyped-def]
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    return word ^ (word >> 16)


def _mix(word: Tensor) -> Tensor:
    """lowbias32 on int32 in place; torch shifts keep the sign, hence the masks."""
    word.bitwise_xor_((word >> 16).bitwise_and_(0xFFFF)).mul_(_MIX_1)
    word.bitwise_xor_((word >> 15).bitwise_and_(0x1FFFF)).mul_(_MIX_2)
    return word.bitwise_xor_((word >> 16).bitwise_and_(0xFFFF))


def _signed32(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
