"""Encoded unit indices: nothing is lost at any word's limit, and they are as small as predicted."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_dist import Mask
from trace_dist.masks import gaps
from trace_dist.masks.gaps import Gaps, PackedUnits, decode_gaps, encode_gaps, expected_bytes
from trace_dist.masks.units import UnitLayout


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(st.integers(0, 300), st.integers(0, 70_000), st.integers(0, 2**33)), min_size=1, max_size=40
    )
)
def test_gaps_keep_every_index(steps: list[int]) -> None:
    """Differences around the words' limits (255, 32767, 2^31 - 1), first index 0 included; in chunks of every size."""
    units = torch.tensor(steps).cumsum(0) + torch.arange(len(steps))
    words = encode_gaps(units)
    for chunk in (1, 3, gaps.CHUNK):
        with patch.object(gaps, "CHUNK", chunk):
            assert torch.equal(decode_gaps(words, torch.int64), units)
            assert torch.equal(decode_gaps(words, torch.int64, len(units)), units)


@pytest.mark.parametrize("limit", [255, 32767, 2**31 - 1])
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_gaps_at_the_limits(limit: int, offset: int) -> None:
    for gap in (limit + offset, 2 * limit + offset):
        units = torch.tensor([0, gap, gap + 1, 2 * gap + 1])
        assert torch.equal(Gaps.of(units).decode(), units)


@pytest.mark.parametrize("density", [1.0, 0.3, 0.05, 0.01, 0.003, 0.0005])
def test_expected_bytes_are_those_of_random_units(density: float) -> None:
    of = 1 << 21
    chosen = torch.randperm(of, generator=torch.Generator().manual_seed(0))[: round(density * of)]
    units = chosen.sort().values.to(torch.int32)
    assert expected_bytes(len(units), of) == pytest.approx(encode_gaps(units).nbytes, rel=0.02)


def test_a_mask_lies_in_memory_in_a_byte_per_element() -> None:
    layouts = {"w": UnitLayout((1024, 1024), 1)}
    units = torch.randperm(1 << 20, generator=torch.Generator().manual_seed(0))[: 1 << 16].sort().values.int()
    mask = Mask({"w": units}, layouts, "element")
    assert mask.units.nbytes == len(units)
    assert mask.units["w"].dtype == torch.int32
    assert torch.equal(mask.units["w"], units)
    assert "w" in mask.units
    assert "v" not in mask.units
    assert PackedUnits(mask.units).gaps == mask.units.gaps  # packed once
