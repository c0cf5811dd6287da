"""Rows of several examples: every example once, none cut, the same for every number of ranks, and little padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from data.test_batches import PAD, encoded, make
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_dist.data import IGNORE, Step
from trace_dist.data.packing import Layout, collate_packed, pack


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), max_size=40), more=st.integers(0, 9))
def test_each_thing_lies_in_one_row_and_rows_are_not_overfull(lengths: list[int], more: int) -> None:
    capacity = max(lengths, default=1) + more
    rows = pack(lengths, capacity)
    assert sorted(thing for row in rows for thing in row) == list(range(len(lengths)))
    filled = [sum(lengths[thing] for thing in row) for row in rows]
    assert all(0 < size <= capacity for size in filled)
    # best fit never takes twice as many rows as there must be
    assert len(rows) <= max(1, 2 * -(-sum(lengths) // capacity)) if lengths else rows == []
    assert rows == pack(lengths, capacity)


def test_rows_are_as_few_as_best_fit_makes_them_and_filled_evenly() -> None:
    assert pack([2, 2, 2, 2, 6, 2], 10) == [[4, 3], [0, 1, 2, 5]]
    assert pack([3, 7, 4, 6, 4], 10) == [[1], [3, 0], [2, 4]]
    # evenly, a row would hold 11
    assert pack([5, 5, 4, 4, 2], 10) == [[0, 1], [2, 3, 4]]


def test_positions_begin_anew_and_padding_is_an_example_of_its_own() -> None:
    examples = [
        {"input_ids": [11, 12, 13], "labels": [IGNORE, 12, 13]},
        {"input_ids": [21, 22], "labels": [IGNORE, 22]},
        {"input_ids": [31, 32], "labels": [IGNORE, 32]},
    ]
    rows = collate_packed([examples[:2], examples[2:]], PAD, "rows")
    assert rows["input_ids"].tolist() == [[11, 12, 13, 21, 22], [31, 32, PAD, PAD, PAD]]
    assert rows["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert rows["labels"].tolist() == [[IGNORE, 12, 13, IGNORE, 22], [IGNORE, 32, IGNORE, IGNORE, IGNORE]]
    flat = collate_packed([examples[:2], examples[2:]], PAD, "flat")
    assert flat["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert flat["labels"].tolist() == [[IGNORE, 12, 13, IGNORE, 22, IGNORE, 32]]
    assert {key: value.tolist() for key, value in collate_packed([], PAD, "rows").items()} == {
        "input_ids": [[PAD, PAD]], "position_ids": [[0, 1]], "labels": [[IGNORE, IGNORE]],
    }  # fmt: skip


def packed(layout: Layout = "rows", rank: int = 0, world: int = 1, **options: Any) -> Any:
    made = make(encoded(13), rank, world, packing=True, replay=[(encoded(3, offset=100), 1.0)], replay_share=0.3,
                **options)  # fmt: skip
    made.pack(layout)
    return made


def rows_of(step: Step) -> list[list[int]]:
    """The examples of each row that is no filler."""
    found = []
    for micro in step.micro_batches:
        assert "attention_mask" not in micro
        for ids, positions in zip(micro["input_ids"], micro["position_ids"], strict=True):
            starts = torch.nonzero(positions == 0).flatten().tolist()
            row = [int(ids[start]) for start in starts if ids[start] != PAD]
            found += [row] if row else []
    return found


@pytest.mark.parametrize("world", [2, 3, 7])
def test_the_rows_do_not_depend_on_the_number_of_ranks(world: int) -> None:
    whole = packed(batch_size=9)
    ranks = [packed(rank=rank, world=world, batch_size=9) for rank in range(world)]
    plain = make(encoded(13), batch_size=9, replay=[(encoded(3, offset=100), 1.0)], replay_share=0.3)
    for _ in range(4):
        expected, steps, unpacked = next(whole), [next(each) for each in ranks], next(plain)
        assert [row for step in steps for row in rows_of(step)] == rows_of(expected)
        assert len({len(step.micro_batches) for step in steps}) == 1
        assert {step.num_answer_tokens for step in steps} == {unpacked.num_answer_tokens}
        counted = sum(int((m["labels"] != IGNORE).sum()) for step in steps for m in step.micro_batches)
        assert counted == unpacked.num_answer_tokens
        seen = sorted(token for row in rows_of(expected) for token in row)
        assert seen == sorted(int(row[0]) for micro in unpacked.micro_batches for row in micro["input_ids"])


def test_it_goes_on_at_the_same_rows() -> None:
    straight = packed()
    for _ in range(3):
        next(straight)
    again = packed()
    again.load_state_dict(straight.state_dict())
    assert rows_of(next(again)) == rows_of(next(straight))


def test_a_row_is_no_longer_than_the_longest_example() -> None:
    made = packed(batch_size=11, micro_batch_size=3)
    for _ in range(4):
        step = next(made)
        assert max(micro["input_ids"].shape[1] for micro in step.micro_batches) <= 6
        assert all(len(micro["input_ids"]) <= 3 for micro in step.micro_batches)


def test_the_padding_that_is_told_is_that_of_the_batches() -> None:
    for layout in (None, "rows"):
        made = packed(batch_size=12, micro_batch_size=4)
        made.pack(layout)
        told = made.padding(5)[layout is not None]
        steps = [next(made) for _ in range(5)]
        positions = sum(micro["input_ids"].numel() for step in steps for micro in step.micro_batches)
        tokens = sum(int((micro["input_ids"] != PAD).sum()) for step in steps for micro in step.micro_batches)
        assert told == pytest.approx(1 - tokens / positions)


def test_mixed_lengths_leave_little_padding() -> None:
    """Lengths as of people's instructions: most short, some long."""
    lengths = np.clip(np.random.default_rng(0).lognormal(4.5, 0.9, 4096), 8, 1024).astype(int)
    plain, rows = 0, 0
    for batch in lengths.reshape(-1, 32):
        filled = [sum(int(batch[i]) for i in row) for row in pack(batch.tolist(), int(lengths.max()))]
        plain += sum(8 * int(part.max()) for part in batch.reshape(-1, 8))
        rows += len(filled) * max(filled)
    assert 1 - lengths.sum() / plain > 0.6
    assert 1 - lengths.sum() / rows < 0.03
