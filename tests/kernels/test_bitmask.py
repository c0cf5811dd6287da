"""Packing and unpacking booleans."""

from __future__ import annotations

import pytest
import torch
from trace_kernels import pack, unpack
from trace_kernels.bitmask import pack_ref, unpack_ref
from trace_kernels.dispatch import Impl


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 64, 1000, 8 * 1024 + 3])
def test_round_trip(impl: Impl, device: str, n: int) -> None:
    for mask in (torch.rand(n, device=device) < 0.3, torch.ones(n, device=device).bool()):
        packed = pack(mask, impl=impl)
        assert packed.shape == (-(-n // 8),)
        assert torch.equal(packed, pack_ref(mask))
        assert torch.equal(unpack(packed, n, impl=impl), mask)
        assert torch.equal(unpack_ref(packed, n), mask)


def test_round_trip_over_several_chunks() -> None:
    mask = torch.rand(1_200_001) < 0.5
    assert torch.equal(pack(mask), pack_ref(mask))
    assert torch.equal(unpack(pack(mask), mask.numel()), mask)


def test_bit_order_is_little_endian(impl: Impl, device: str) -> None:
    for bit in range(16):
        mask = torch.zeros(16, dtype=torch.bool, device=device)
        mask[bit] = True
        word = int.from_bytes(bytes(pack(mask, impl=impl).tolist()), "little")
        assert word == 1 << bit


def test_mask_that_starts_off_alignment(impl: Impl, device: str) -> None:
    mask = (torch.rand(1003, device=device) < 0.5)[3:]
    assert torch.equal(unpack(pack(mask, impl=impl), 1000, impl=impl), mask)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="mask: dtype"):
        pack(torch.zeros(8))
    with pytest.raises(ValueError, match=r"packed: shape \(1,\)"):
        unpack(torch.zeros(1, dtype=torch.uint8), 9)
