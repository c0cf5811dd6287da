"""Bit-packed masks: one bit per entry, element i in bit i % 8 of byte i // 8 (little-endian bit order).

    packed[j] = sum over l < 8 of mask[8 j + l] << l

This is how an element mask of a whole parameter travels and rests: 1/8 byte per parameter, against 4 to 8
bytes per selected index. The torch path packs eight booleans with one 64-bit multiplication: with a boolean
per byte at bit 8 i, the multiplier's bits 56 - 7 i carry each of them to bit 56 + i, and no two products
collide.
"""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import TILE, BenchCase, Impl, check_vector, launch, use_triton
from .runs import CHUNK

_PACK = sum(1 << (56 - 7 * i) for i in range(8))
_SPREAD = sum(1 << (8 * i) for i in range(8))
# Byte i keeps its bit i; as a signed 64-bit integer.
_SELECT = sum(1 << (9 * i) for i in range(8)) - (1 << 64)


def pack_ref(mask: Tensor) -> Tensor:
    """Packs by powers of two."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.numel() % 8))
    return (
        (padded.view(-1, 8) << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1).to(torch.uint8)
    )


def unpack_ref(packed: Tensor, n: int) -> Tensor:
    """Unpacks by shifts."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & 1).view(-1)[:n].bool()


@triton.jit
def _pack_kernel(mask_ptr, packed_ptr, n, BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    lane = tl.arange(0, 8)[None, :]
    index = byte[:, None] * 8 + lane
    bit = tl.load(mask_ptr + index, mask=index < n, other=0).to(tl.int32)
    tl.store(packed_ptr + byte, tl.sum(bit << lane, axis=1).to(tl.uint8), mask=byte * 8 < n)


@triton.jit
def _unpack_kernel(packed_ptr, mask_ptr, n, BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    lane = tl.arange(0, 8)[None, :]
    index = byte[:, None] * 8 + lane
    word = tl.load(packed_ptr + byte, mask=byte * 8 < n, other=0).to(tl.int32)
    tl.store(mask_ptr + index, ((word[:, None] >> lane) & 1).to(tl.uint8), mask=index < n)


def pack(mask: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Packs a boolean vector.

    Args:
        mask: [n] bool.
        impl: see dispatch.py.

    Returns:
        [ceil(n / 8)] uint8; the unused high bits of the last byte are 0.
    """
    check_vector("mask", mask, mask.numel(), (torch.bool,))
    packed = mask.new_empty(-(-mask.numel() // 8), dtype=torch.uint8)
    if not use_triton(impl, mask):
        _pack_torch(mask, packed)
    elif mask.numel():
        num_programs = triton.cdiv(packed.numel(), TILE // 8)
        launch(
            _pack_kernel,
            num_programs,
            mask.device,
            mask.view(torch.uint8),
            packed,
            mask.numel(),
            BYTES=TILE // 8,
        )
    return packed


def unpack(packed: Tensor, n: int, *, impl: Impl = "auto") -> Tensor:
    """Inverse of `pack`.

    Args:
        packed: [ceil(n / 8)] uint8.
        n: number of booleans.
        impl: see dispatch.py.

    Returns:
        [n] bool.
    """
    if n < 0:
        raise ValueError(f"n = {n}: must be at least 0")
    check_vector("packed", packed, -(-n // 8), (torch.uint8,))
    if not use_triton(impl, packed):
        return _unpack_torch(packed, n)
    mask = packed.new_empty(n, dtype=torch.bool)
    if n:
        num_programs = triton.cdiv(packed.numel(), TILE // 8)
        launch(
            _unpack_kernel, num_programs, packed.device, packed, mask.view(torch.uint8), n, BYTES=TILE // 8
        )
    return mask


def bench_case(numel: int, density: float, block: int, dtype: torch.dtype, device: str) -> BenchCase:
    """Packs a random mask; ``block`` and ``dtype`` play no part."""
    mask = torch.rand(numel, device=device) < density
    return BenchCase(lambda: pack(mask), numel + numel // 8)


def _pack_torch(mask: Tensor, packed: Tensor) -> None:
    num_whole = mask.numel() // 8
    if sys.byteorder != "little" or mask.storage_offset() % 8:
        packed.copy_(pack_ref(mask))
        return
    words = mask[: num_whole * 8].view(torch.int64)
    for begin in range(0, num_whole, CHUNK):
        end = min(begin + CHUNK, num_whole)
        packed[begin:end] = (words[begin:end] * _PACK) >> 56
    packed[num_whole:] = pack_ref(mask[num_whole * 8 :])


def _unpack_torch(packed: Tensor, n: int) -> Tensor:
    if sys.byteorder != "little":
        return unpack_ref(packed, n)
    mask = packed.new_empty(packed.numel() * 8, dtype=torch.bool)
    for begin in range(0, packed.numel(), CHUNK):
        words = (packed[begin : begin + CHUNK].long() * _SPREAD) & _SELECT
        mask[begin * 8 : (begin + CHUNK) * 8] = words.view(torch.uint8) != 0
    return mask[:n]
