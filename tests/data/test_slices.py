"""Slices of rows: together they are the rows, and each knows what follows it."""

from __future__ import annotations

import datasets
import pytest
import torch
from torch.nn.functional import pad

from trace_dist.data.batches import Batches, collate
from trace_dist.data.packing import collate_packed
from trace_dist.data.slices import ROW_POSITIONS, sliced

LENGTHS = (3, 11, 5, 2, 7, 4, 9, 13, 2, 6, 17)


def examples() -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(3)
    made = [torch.randint(3, 101, (length,), generator=generator).tolist() for length in LENGTHS]
    return [{"input_ids": ids, "labels": [-100, *ids[1:]], "num_answer_tokens": len(ids) - 1} for ids in made]


@pytest.mark.parametrize("size", [2, 3, 4, 5])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_slices_are_the_row(size: int, packed: bool) -> None:
    rows = examples()
    whole = collate_packed([rows[:3], rows[3:6]], 0, "rows") if packed else collate(rows, 0)
    parts = [sliced(whole, size, index, pad_id=7) for index in range(size)]
    length = parts[0]["input_ids"].shape[1]
    end = whole["input_ids"].shape[1]
    assert (size - 1) * length < end <= size * length
    ids = torch.cat([part["input_ids"] for part in parts], 1)
    assert torch.equal(ids[:, :end], whole["input_ids"])
    assert (ids[:, end:] == 7).all()
    # What follows each token, over the borders.
    targets = torch.cat([part["labels"][:, 1:] for part in parts], 1)
    assert torch.equal(targets[:, :end], pad(whole["labels"][:, 1:], (0, 1), value=-100))
    assert (targets[:, end:] == -100).all()
    positions = torch.cat([part["position_ids"] for part in parts], 1)
    expected = whole["position_ids"] if packed else torch.arange(end)[None]
    assert torch.equal(positions[:, :end], expected)
    assert positions.max() < end
    marks = [part[ROW_POSITIONS] for part in parts]
    assert all(torch.equal(mark, positions if packed else torch.zeros(1, 1)) for mark in marks)


def test_rows_with_padding_on_the_left_are_refused() -> None:
    ids = torch.ones(1, 4, dtype=torch.int64)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.tensor([[0, 1, 1, 1]])}
    with pytest.raises(ValueError, match="attention_mask: rows that ranks share are padded on the right"):
        sliced(batch, 2, 0)


@pytest.mark.parametrize(("ranks", "size"), [(2, 2), (4, 2), (6, 3)])
def test_groups_of_ranks_read_what_fewer_ranks_would(ranks: int, size: int) -> None:
    """The order of the data, the micro-batches and the counts are those of ``ranks / size`` ranks."""

    def stream(rank: int, world_size: int) -> Batches:
        return Batches(
            datasets.Dataset.from_list(examples()),
            batch_size=7,
            micro_batch_size=2,
            seed=5,
            rank=rank,
            world_size=world_size,
        )

    streams = [stream(rank, ranks) for rank in range(ranks)]
    for each in streams:
        each.share_rows(size)
    fewer = [stream(rank, ranks // size) for rank in range(ranks // size)]
    for _ in range(4):
        steps, whole = [next(each) for each in streams], [next(each) for each in fewer]
        for rank, step in enumerate(steps):
            expected = whole[rank // size]
            assert step.num_answer_tokens == expected.num_answer_tokens
            parts = [sliced(batch, size, rank % size) for batch in expected.micro_batches]
            assert len(parts) == len(step.micro_batches)
            for part, found in zip(parts, step.micro_batches, strict=True):
                assert part.keys() == found.keys()
                assert all(torch.equal(part[name], found[name]) for name in part)


def test_ranks_that_cannot_be_divided_are_refused() -> None:
    batches = Batches(
        datasets.Dataset.from_list(examples()), batch_size=2, micro_batch_size=1, seed=0, rank=0, world_size=3
    )
    with pytest.raises(ValueError, match=r"train\.sequence_parallel=2: must divide the 3 ranks of the job"):
        batches.share_rows(2)
