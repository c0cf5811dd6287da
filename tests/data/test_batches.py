from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_dist.data import IGNORE, Batches, Step

PAD = 0


def encoded(num: int, offset: int = 1) -> datasets.Dataset:
    """Example i is the token offset + i, repeated, with a loss on a varying number of its last copies."""
    rows = []
    for i in range(num):
        length, answer = 2 + i % 5, 1 + i % 2
        ids = [offset + i] * length
        labels = [IGNORE] * (length - answer) + ids[:answer]
        rows.append({"input_ids": ids, "labels": labels, "num_answer_tokens": answer})
    return datasets.Dataset.from_list(rows)


def make(data: datasets.Dataset, rank: int = 0, world: int = 1, **options: Any) -> Batches:
    defaults: dict[str, Any] = {"batch_size": 5, "micro_batch_size": 2, "seed": 7, "pad_id": PAD}
    return Batches(data, rank=rank, world_size=world, **{**defaults, **options})


def tokens_of(step: Step) -> list[int]:
    """The examples of a step, each by its token, in order; fillers have none."""
    return [int(row[0]) for micro in step.micro_batches for row in micro["input_ids"] if row[0] != PAD]


@settings(max_examples=40, deadline=None)
@given(
    num=st.integers(1, 17),
    batch=st.integers(1, 12),
    micro=st.integers(1, 5),
    world=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 2**31),
    share=st.sampled_from([0.0, 0.4]),
)
def test_shares_tile_each_global_batch(
    num: int, batch: int, micro: int, world: int, seed: int, share: float
) -> None:
    data, old = encoded(num), encoded(3, offset=100)
    options: dict[str, Any] = {"batch_size": batch, "micro_batch_size": micro, "seed": seed}
    replay: dict[str, Any] = {"replay": [(old, 1.0)], "replay_share": share}
    whole = make(data, **options, **replay)
    ranks = [make(data, rank, world, **options, **replay) for rank in range(world)]
    for _ in range(4):
        reference = next(whole)
        steps = [next(each) for each in ranks]
        assert [t for step in steps for t in tokens_of(step)] == tokens_of(reference)
        assert len(tokens_of(reference)) == batch
        assert len({len(step.micro_batches) for step in steps}) == 1  # collectives must match
        assert max(len(tokens_of(s)) for s in steps) - min(len(tokens_of(s)) for s in steps) <= 1
        counted = sum(int((m["labels"] != IGNORE).sum()) for step in steps for m in step.micro_batches)
        assert {step.num_answer_tokens for step in steps} == {counted}
        assert all(len(m["input_ids"]) <= micro for step in steps for m in step.micro_batches)


@settings(max_examples=30, deadline=None)
@given(steps=st.integers(0, 9), world=st.sampled_from([1, 2, 3]), share=st.sampled_from([0.0, 0.5]))
def test_resume_equals_no_interruption_on_any_world_size(steps: int, world: int, share: float) -> None:
    options: dict[str, Any] = {"replay": [(encoded(3, offset=100), 1.0)], "replay_share": share}
    straight = make(encoded(13), **options)
    interrupted = make(encoded(13), 0, 2, **options)
    for _ in range(steps):
        next(straight)
        next(interrupted)
    resumed = [make(encoded(13), rank, world, **options) for rank in range(world)]
    for each in resumed:
        each.load_state_dict(interrupted.state_dict())
    for _ in range(3):
        expected = tokens_of(next(straight))
        assert [t for each in resumed for t in tokens_of(next(each))] == expected


def test_each_epoch_holds_every_example_once_in_a_new_order() -> None:
    batches = make(encoded(12), batch_size=5)
    stream = [t for _ in range(12) for t in tokens_of(next(batches))]
    epochs = [stream[i : i + 12] for i in range(0, 60, 12)]
    assert all(sorted(epoch) == list(range(1, 13)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    other = make(encoded(12), batch_size=5, seed=8)
    assert [t for _ in range(12) for t in tokens_of(next(other))] != stream


def test_stream_does_not_depend_on_the_batch_size() -> None:
    replay: dict[str, Any] = {"replay": [(encoded(30, offset=100), 1.0)], "replay_share": 0.5}
    large, small = make(encoded(13), batch_size=30, **replay), make(encoded(13), batch_size=3, **replay)
    stream = [t for _ in range(2) for t in tokens_of(next(large))]
    assert stream == [t for _ in range(20) for t in tokens_of(next(small))]
    assert 15 < sum(t >= 100 for t in stream) < 45


def test_padding_is_right_masked_and_no_longer_than_needed() -> None:
    for _, step in zip(range(6), make(encoded(13)), strict=False):
        for micro in step.micro_batches:
            ids, mask, labels = micro["input_ids"], micro["attention_mask"], micro["labels"]
            assert ids.dtype == mask.dtype == labels.dtype == torch.int64
            assert ids.shape == mask.shape == labels.shape
            assert torch.equal(mask, (ids != PAD).long())
            assert bool((mask.diff(dim=1) <= 0).all())
            assert int(mask.sum(dim=1).max()) == ids.shape[1]
            assert bool((labels[mask == 0] == IGNORE).all())


def test_rank_without_examples_gets_fillers() -> None:
    idle = next(make(encoded(4), rank=2, world=3, batch_size=2))
    (filler,) = idle.micro_batches
    assert bool((filler["labels"] == IGNORE).all())
    assert filler["input_ids"].shape == (1, 2)
    assert int(filler["attention_mask"].sum()) == 2
    assert idle.num_answer_tokens > 0


def test_replay_share_and_weights() -> None:
    replay = [(encoded(9, offset=100), 3.0), (encoded(5, offset=200), 1.0)]
    batches = make(encoded(40), batch_size=2000, micro_batch_size=2000, replay=replay, replay_share=0.2)
    drawn = tokens_of(next(batches))
    first = sum(100 <= t < 200 for t in drawn) / 2000
    second = sum(t >= 200 for t in drawn) / 2000
    assert first == pytest.approx(0.15, abs=0.03)
    assert second == pytest.approx(0.05, abs=0.02)
    plain = tokens_of(next(make(encoded(40), batch_size=2000, micro_batch_size=2000)))
    assert all(a == b for a, b in zip(drawn, plain, strict=True) if a < 100)  # replay only replaces slots


def test_state_of_other_data_is_refused() -> None:
    state = make(encoded(13)).state_dict()
    with pytest.raises(ValueError, match="num_examples=13: this run has 12"):
        make(encoded(12)).load_state_dict(state)
    with pytest.raises(ValueError, match="seed=7: this run has 8"):
        make(encoded(13), seed=8).load_state_dict(state)


def test_state_of_data_that_were_changed_in_place_is_refused() -> None:
    """As many examples, other ones; a state of an earlier release says nothing of them."""
    state = make(encoded(13)).state_dict()
    other = make(encoded(13, offset=2))
    with pytest.raises(
        ValueError, match=r"digest=\d+: this run has \d+; resume with the seed and the data of the"
    ):
        other.load_state_dict(state)
    del state["digest"]
    other.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"micro_batch_size": 0}, "micro_batch_size=0"),
        ({"replay_share": 1.0}, r"must lie in \[0, 1\)"),
        ({"replay_share": 0.1}, "no dataset to replay"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(encoded(4), **options)
    with pytest.raises(ValueError, match="has no examples"):
        make(encoded(4).select([]))
