"""Several examples in one row, so that no time goes into padding.

[Note: packed rows] The examples of a global batch are put into rows that hold as many tokens as the longest example of all: a
row is never longer than what the model must read in any case. How many rows there are is found by putting the longest first, each
into the fullest row that has room for it (best fit decreasing). Then as many rows are filled evenly, each example into the
emptiest: the ranks have equal work, and a micro-batch of rows has little padding. Where a row would be too long, those of the
best fit stay.

Position ids begin anew with each example, and there is no attention mask: a model of transformers then lets tokens attend within
their own example alone. What is left of a row is one more example, of padding, without a loss. The rows depend on the global
batch alone, not on the number of ranks. Whether a model keeps examples apart is measured (train/packing.py).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from heapq import heapreplace
from typing import Any, Literal

import torch

from trace_dist.data.encoding import IGNORE

Layout = Literal["rows", "flat"]
"""``rows``: [rows, longest]. ``flat``: [1, tokens], the rows one after another, which is how flash attention takes examples of
several lengths."""
Row = Mapping[str, Sequence[int]]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put things into rows ([Note: packed rows]).

    Args:
        lengths: of the things, each at most ``capacity``.
        capacity: of a row.

    Returns:
        The numbers of the things in each row, in the order in which they were put there.
    """
    order = sorted(range(len(lengths)), key=lambda thing: -lengths[thing])
    rows = _best_fit(lengths, order, capacity)
    even = _evenly(lengths, order, len(rows))
    fits = all(sum(lengths[thing] for thing in row) <= capacity for row in even)
    return even if fits else rows


def _best_fit(lengths: Sequence[int], order: Sequence[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is left, number of the row), rising
    for thing in order:
        place = bisect_left(room, (lengths[thing], 0))
        if place == len(room):
            left, row = capacity, len(rows)
            rows.append([])
        else:
            left, row = room.pop(place)
        rows[row].append(thing)
        insort(room, (left - lengths[thing], row))
    return rows


def _evenly(lengths: Sequence[int], order: Sequence[int], num_rows: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    filled = [(0, row) for row in range(num_rows)]
    for thing in order:
        tokens, row = filled[0]
        rows[row].append(thing)
        heapreplace(filled, (tokens + lengths[thing], row))
    return rows


def collate_packed(rows: Sequence[Sequence[Row]], pad_id: int, layout: Layout) -> dict[str, torch.Tensor]:
    """A micro-batch of packed examples; without any, the shortest input that a causal LM's loss accepts.

    Args:
        rows: the encoded examples of each row.
        pad_id: id for padded positions.
        layout: of the tensors.

    Returns:
        ``input_ids``, ``position_ids`` and ``labels``, int64 [rows, longest], or [1, tokens] where the layout is flat.
    """
    rows = rows or [[{"input_ids": [pad_id] * 2, "labels": [IGNORE] * 2}]]
    if layout == "flat":
        rows = [[example for row in rows for example in row]]
    longest = max(map(num_tokens, rows))
    columns: dict[str, Any] = {"input_ids": [], "position_ids": [], "labels": []}
    for row in rows:
        left = longest - num_tokens(row)
        filler: Row = {"input_ids": [pad_id] * left, "labels": [IGNORE] * left}
        whole = [*row, filler]
        for key in ("input_ids", "labels"):
            columns[key].append([value for example in whole for value in example[key]])
        columns["position_ids"].append(
            [position for example in whole for position in range(len(example["input_ids"]))]
        )
    return {key: torch.tensor(values) for key, values in columns.items()}


def num_tokens(row: Sequence[Row]) -> int:
    """Tokens of the examples of a row."""
    return sum(len(example["input_ids"]) for example in row)
