"""Runs.clip tiles a mask over any cut into ranks; pieces and indices agree; wrong runs are refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_kernels import Runs
from trace_kernels.runs import entries_below


@st.composite
def masks_and_cuts(draw: st.DrawFn) -> tuple[torch.Tensor, int, int, list[int]]:
    block = draw(st.sampled_from([1, 2, 3, 16, 17, 64, 100]))
    num_units = draw(st.integers(1, 40))
    units = sorted(draw(st.sets(st.integers(0, num_units - 1))))
    numel = num_units * block
    cuts = sorted(draw(st.lists(st.integers(0, numel), max_size=6)))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    return torch.tensor(units, dtype=dtype), block, numel, [0, *cuts, numel]


@settings(deadline=None, max_examples=300)
@given(masks_and_cuts(), st.sampled_from([4, 50, 1 << 16]))
def test_ranks_tile_the_mask_once_and_in_order(mask: tuple, chunk: int) -> None:
    units, block, numel, cuts = mask
    whole = (units.long()[:, None] * block + torch.arange(block)).view(-1)
    by_index, by_piece = [], []
    for start, stop in itertools.pairwise(cuts):
        runs = Runs.clip(units, block, start, stop, numel)
        local = torch.arange(start, stop)
        pieces = list(runs.pieces(chunk))
        assert [p.start for p in pieces] == [0, *(p.stop for p in pieces)][: len(pieces)]
        assert all(p.stop - p.start <= max(chunk, 1) for p in pieces)
        for piece in pieces:
            assert torch.equal(piece.indices(local.device) + start, piece.gather(local))
        by_index.append(runs.indices() + start)
        by_piece += [piece.gather(local) for piece in pieces]
        assert runs.num_entries == runs.indices().numel()
    assert torch.equal(torch.cat(by_index), whole)
    assert torch.equal(torch.cat(by_piece or [whole]), whole)
    below = entries_below(units, block, cuts)
    assert [b - a for a, b in itertools.pairwise(below)] == [len(part) for part in by_index]


def test_clip_makes_no_copy() -> None:
    units = torch.arange(100, dtype=torch.int32)
    runs = Runs.clip(units, 16, 400, 900, 1600)
    assert runs.units.untyped_storage().data_ptr() == units.untyped_storage().data_ptr()
    assert (runs.skip, runs.tail, runs.num_entries) == (0, 12, 500)


def test_a_copy_lets_the_units_around_it_go() -> None:
    units = torch.arange(100, dtype=torch.int32)
    runs = Runs.clip(units, 16, 400, 900, 1600)
    copied = runs.copied()
    assert copied.units.untyped_storage().nbytes() == 4 * copied.num_units
    assert torch.equal(copied.indices(), runs.indices())


def test_view_past_the_range_of_int32_units() -> None:
    units = torch.tensor([0, 2**31 - 1], dtype=torch.int32)
    beyond = Runs.clip(units, 1, 2**31, 2**33, 2**34)
    last = Runs.clip(units, 1, 2**31 - 1, 2**33, 2**34)
    assert (beyond.num_entries, last.num_entries) == (0, 1)
    assert entries_below(units, 1, [0, 2**31 - 1, 2**31, 2**33]) == [0, 1, 2, 2]


@pytest.mark.parametrize(
    ("units", "block", "view", "match"),
    [
        ([3, 1], 1, (0, 10, 10), "sorted"),
        ([1, 1], 1, (0, 10, 10), "unique"),
        ([-1, 1], 1, (0, 10, 10), ">= 0"),
        ([4], 3, (0, 10, 14), "block = 1 where units do not tile"),
        ([1], 0, (0, 10, 10), "block = 0"),
        ([1], 1, (5, 4, 10), "view"),
        ([1], 1, (0, 11, 10), "view"),
        ([1.0], 1, (0, 10, 10), "int32 or int64"),
    ],
)
def test_refuses(units: list, block: int, view: tuple[int, int, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Runs.clip(torch.tensor(units), block, *view)


def test_refuses_runs_built_by_hand_that_do_not_fit() -> None:
    units = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="leave 0 and 8"):
        Runs(units, 4, base=0, numel=16, num_entries=7, skip=0)
    with pytest.raises(ValueError, match="outside the view"):
        Runs(units, 4, base=0, numel=8, num_entries=8, skip=0)
