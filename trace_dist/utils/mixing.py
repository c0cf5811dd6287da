"""Integers that look random and are the same everywhere: SplitMix64 (Steele, Lea, Flood 2014) of counters."""

from __future__ import annotations

from torch import Tensor


def shift(x: Tensor, bits: int) -> Tensor:
    """Shift int64 to the right as if it were unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor, key: int) -> Tensor:
    """Mixed int64 counters, keyed."""
    x = x * _signed(0x9E3779B97F4A7C15) + key
    x = (x ^ shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ shift(x, 31)


def _signed(word: int) -> int:
    """A 64-bit word as int64 has it."""
    return word - (1 << 64) if word >> 63 else word
