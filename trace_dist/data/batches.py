"""Global batches that do not depend on the number of ranks, and that resume at the exact example.

[Note: position]
The stream of training examples is a function of the seed alone: slot p (0, 1, 2, ...) holds example
``permutation(seed, p // N)[p % N]`` of the N examples, or, with probability ``replay_share``, an example of
a replay dataset drawn by a generator seeded with p. Global batch g is the slots [g * B, (g + 1) * B); it may
straddle epochs. So the number of examples consumed is the whole state, whatever the world size.

Every rank knows every global batch, takes one contiguous share of it, and counts the answer tokens of
all shares without communication: the loss of a step is the sum over its tokens divided by that count.

What is shared out are examples, or rows of several examples (data/packing.py). Where several ranks share rows (``share_rows``)
each group of them takes the share of one rank, and every rank of it a slice of each row (data/slices.py).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from trace_dist.config.checks import check_ranks
from trace_dist.data.encoding import IGNORE
from trace_dist.data.packing import Layout, collate_packed, pack
from trace_dist.data.slices import sliced
from trace_dist.utils import dist
from trace_dist.utils.agreement import agree

# Keeps the two uses of the seed apart.
_SHUFFLE, _REPLAY = 0, 1
DIGESTED_ROWS = 10_000
"""Examples that are read at a time to compare the ranks' data."""
Collate = Callable[[Sequence[Mapping[str, Any]]], dict[str, torch.Tensor]]
"""Encoded examples -> a micro-batch; a filler where there are none."""
Slot = tuple[int, int]
"""Which dataset (0 is the main one, then the replay datasets) and which of its examples."""


@dataclass(frozen=True)
class Step:
    """One rank's part of a global batch.

    ``micro_batches``: the same number on every rank; each ``{"input_ids", "attention_mask", "labels"}``,
    int64 [micro-batch, longest], on the CPU, padded on the right; of packed rows as ``collate_packed`` gives it. A rank
    short of examples gets filler micro-batches whose labels are all -100. ``num_answer_tokens``: tokens with a loss in
    the *global* batch. ``nll_sum``: the loss of a micro-batch; None where it is that of text (train/loss.py).
    """

    micro_batches: list[dict[str, torch.Tensor]]
    num_answer_tokens: int
    nll_sum: Callable[..., torch.Tensor] | None = None


class Batches(Iterator[Step]):
    """Endless, deterministic, resumable stream of steps over an encoded dataset ([Note: position]).

    Args:
        dataset: output of ``encode``.
        batch_size: examples per global batch, over all ranks.
        micro_batch_size: examples per forward pass on one rank; rows of them where they are packed.
        seed: of order and replay.
        pad_id: id for padded positions.
        collate: makes a micro-batch of encoded examples that are no text.
        nll_sum: as of ``Step``.
        replay: encoded datasets with their weights among each other.
        replay_share: probability that a slot is drawn from ``replay`` instead.
        packing: whether examples shall share rows, where the model that reads them allows it (``pack``).
        rank, world_size: of this process; the process group's when not given.

    Raises:
        ValueError: no examples, sizes below 1, a share outside [0, 1), a share without replay datasets, or
            ranks with other examples or options (checked only on the process group's own ranks).
    """

    are_given: ClassVar[bool] = True
    """Whether the examples are the user's. Those that a model has written may differ a little where they are written again."""

    def __init__(
        self,
        dataset: datasets.Dataset,
        *,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        pad_id: int = 0,
        collate: Collate | None = None,
        nll_sum: Callable[..., torch.Tensor] | None = None,
        replay: Sequence[tuple[datasets.Dataset, float]] = (),
        replay_share: float = 0.0,
        packing: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        for name, size in (("batch_size", batch_size), ("micro_batch_size", micro_batch_size)):
            if size < 1:
                raise ValueError(f"{name}={size}: must be at least 1; raise it")
        if not 0 <= replay_share < 1:
            raise ValueError(f"replay_share={replay_share}: must lie in [0, 1); use for example 0.01")
        if replay_share > 0 and not sum(weight for _, weight in replay) > 0:
            raise ValueError(f"replay_share={replay_share}: there is no dataset to replay; use 0 or give one")
        self._datasets = [dataset, *(replayed for replayed, _ in replay)]
        if not all(len(each) for each in self._datasets):
            raise ValueError("dataset: a training or replay dataset has no examples; give it some")
        self._num_answer_tokens = [np.asarray(each["num_answer_tokens"][:]) for each in self._datasets]
        self._weights = np.asarray([weight for _, weight in replay], dtype=np.float64)
        self._replay_share = replay_share
        self._batch_size = batch_size
        self._micro_batch_size = micro_batch_size
        self._seed = seed
        self._pad_id = pad_id
        self._collate_rows, self._nll_sum = collate, nll_sum
        self.wants_packing = packing
        """Whether packing was asked for, and nobody has decided on it."""
        self._layout: Layout | None = None  # not None iff examples share rows
        self._sharers = 1
        self._rank = dist.rank() if rank is None else rank
        self._world_size = dist.world_size() if world_size is None else world_size
        if world_size is None:
            self._check_same_on_all_ranks()
        self._consumed = 0
        self._epoch: tuple[int, np.ndarray] | None = None  # the last permutation used, with its number

    def __next__(self) -> Step:
        slots = self._slots(self._consumed)
        self._consumed += self._batch_size
        num_tokens = sum(int(self._num_answer_tokens[source][row]) for source, row in slots)
        rows = [[slot] for slot in slots] if self._layout is None else self._packed(slots)
        shares = np.array_split(np.arange(len(rows)), self._world_size // self._sharers)
        share = [rows[i] for i in shares[self._rank // self._sharers]]
        size = self._micro_batch_size
        num_micro = math.ceil(len(shares[0]) / size)  # array_split gives the first rank the most
        micro_batches = [self._collate(share[i * size : (i + 1) * size]) for i in range(num_micro)]
        if self._sharers > 1:
            micro_batches = [self._slice(whole, self._rank % self._sharers) for whole in micro_batches]
        return Step(micro_batches, num_tokens, self._nll_sum)

    def share_rows(self, size: int) -> None:
        """Let every ``size`` ranks, one after another, share rows from now on; 1: each rank has rows of its own.

        Raises:
            ValueError: the ranks cannot be divided so, or the examples are no text.
        """
        if size > 1 and self._collate_rows is not None:
            raise ValueError(f"train.sequence_parallel={size}: shares rows of text; these are none; use 1")
        check_ranks(self._world_size, size, "train.sequence_parallel")
        self._sharers = size

    def pack(self, layout: Layout | None) -> None:
        """Let examples share rows from now on; None does not, and settles that they shall not."""
        self.wants_packing, self._layout = False, layout

    def padding(self, num_batches: int) -> tuple[float, float]:
        """Share of the positions of the coming global batches that is padding: as examples, and in packed rows.

        In micro-batches of one rank; where there are several, it is about the same.
        """
        plain, packed, tokens = 0, 0, 0
        for number in range(num_batches):
            slots = self._slots(self._consumed + number * self._batch_size)
            lengths = [self._length(slot) for slot in slots]
            rows = [sum(map(self._length, row)) for row in self._packed(slots)]
            plain += _positions(lengths, self._micro_batch_size)
            packed += _positions(rows, self._micro_batch_size)
            tokens += sum(lengths)
        return 1 - tokens / plain, 1 - tokens / packed

    def fullest_row(self, num_batches: int = 1) -> list[dict[str, Any]]:
        """The encoded examples of the row of the coming batches that holds the most of them, were they packed."""
        firsts = range(self._consumed, self._consumed + num_batches * self._batch_size, self._batch_size)
        return self._rows(max((row for first in firsts for row in self._packed(self._slots(first))), key=len))

    def rows_ahead(self, num_batches: int) -> set[int]:
        """Rows of the main dataset in the coming global batches, over all ranks."""
        slots = map(self._slot, range(self._consumed, self._consumed + num_batches * self._batch_size))
        return {row for source, row in slots if source == 0}

    def last_rows(self) -> list[int]:
        """Rows of the main dataset in the batch that was given last, over all ranks, rising."""
        slots = [self._slot(p) for p in range(max(0, self._consumed - self._batch_size), self._consumed)]
        return sorted(row for source, row in slots if source == 0)

    def state_dict(self) -> dict[str, int]:
        """Position in the stream, and what the stream is made of."""
        state = {
            "examples_consumed": self._consumed,
            "seed": self._seed,
            "num_examples": len(self._datasets[0]),
        }
        # Of images only the places are known, and those may move.
        compared = self.are_given and "input_ids" in self._datasets[0].column_names
        return state | ({"digest": int(self._digests[0], 16)} if compared else {})

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where ``state_dict`` was taken, on any world size.

        Raises:
            ValueError: the state belongs to another seed or another dataset.
        """
        mine = self.state_dict()
        # A state of an earlier release has no digest.
        for name in ("seed", "num_examples", *({"digest"} & state.keys() & mine.keys())):
            if state.get(name) != mine[name]:
                raise ValueError(
                    f"checkpoint data {name}={state.get(name)}: this run has {mine[name]}; "
                    "resume with the seed and the data of the interrupted run, or start anew"
                )
        consumed = state.get("examples_consumed", -1)
        if consumed < 0:
            raise ValueError(f"checkpoint data examples_consumed={consumed}: is no position; start anew")
        self._consumed = consumed

    def _check_same_on_all_ranks(self) -> None:
        """The ranks' shares tile a global batch only where all ranks read the same examples in the same order."""
        if self._world_size > 1:
            agree(
                {
                    "training data": self._digests,
                    "batch_size": self._batch_size,
                    "micro_batch_size": self._micro_batch_size,
                    "seed": self._seed,
                    "replay_share": self._replay_share,
                }
            )

    def _slot(self, position: int) -> Slot:
        if self._replay_share > 0:
            draw = np.random.default_rng([self._seed, _REPLAY, position])
            if draw.random() < self._replay_share:
                source = 1 + int(draw.choice(len(self._weights), p=self._weights / self._weights.sum()))
                return source, int(draw.integers(len(self._datasets[source])))
        epoch, offset = divmod(position, len(self._datasets[0]))
        if self._epoch is None or self._epoch[0] != epoch:
            order = np.random.default_rng([self._seed, _SHUFFLE, epoch]).permutation(len(self._datasets[0]))
            self._epoch = epoch, order
        return 0, int(self._epoch[1][offset])

    def _slots(self, first: int) -> list[Slot]:
        """A global batch, from a position on."""
        return [self._slot(p) for p in range(first, first + self._batch_size)]

    @cached_property
    def _digests(self) -> list[str]:
        """Of each dataset."""
        return [_digest(each) for each in self._datasets]

    @cached_property
    def _lengths(self) -> list[np.ndarray]:
        """Tokens of each example of each dataset."""
        read = (each.select_columns(["input_ids"]).with_format("arrow")[:] for each in self._datasets)
        return [pc.list_value_length(table["input_ids"]).to_numpy() for table in read]

    def _length(self, slot: Slot) -> int:
        source, row = slot
        return int(self._lengths[source][row])

    def _packed(self, slots: list[Slot]) -> list[list[Slot]]:
        """A global batch in rows of several examples."""
        capacity = max(int(lengths.max()) for lengths in self._lengths)
        return [[slots[i] for i in row] for row in pack([self._length(slot) for slot in slots], capacity)]

    def _collate(self, rows: list[list[Slot]]) -> dict[str, torch.Tensor]:
        """A micro-batch; a filler where there are no rows."""
        return self._tensors([self._rows(row) for row in rows])

    def _tensors(self, rows: list[list[dict[str, Any]]]) -> dict[str, torch.Tensor]:
        """A micro-batch of rows of examples."""
        if self._layout is not None:
            return collate_packed(rows, self._pad_id, self._layout)
        examples = [example for row in rows for example in row]
        return collate(examples, self._pad_id) if self._collate_rows is None else self._collate_rows(examples)

    def _slice(self, whole: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
        """A rank's slice of a micro-batch."""
        return sliced(whole, self._sharers, index, self._pad_id)

    def _rows(self, slots: list[Slot]) -> list[dict[str, Any]]:
        return [self._datasets[source][row] for source, row in slots]


def collate(rows: Sequence[Mapping[str, Sequence[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """A micro-batch, as in ``Step``, of encoded examples; without any, the shortest input that a causal LM's loss accepts."""
    rows = rows or [{"input_ids": [pad_id] * 2, "labels": [IGNORE] * 2}]
    longest = max(len(row["input_ids"]) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_id)
    labels = torch.full((len(rows), longest), IGNORE)
    attention_mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids[i, :length] = torch.tensor(row["input_ids"])
        labels[i, :length] = torch.tensor(row["labels"])
        attention_mask[i, :length] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _positions(lengths: Sequence[int], micro_batch_size: int) -> int:
    """Positions of the micro-batches of some rows, each as wide as its longest."""
    parts = [lengths[i : i + micro_batch_size] for i in range(0, len(lengths), micro_batch_size)]
    return sum(len(part) * max(part) for part in parts)


def _digest(dataset: datasets.Dataset) -> str:
    """Digest of all that is read and its labels, in order."""
    digest = hashlib.sha256()
    read = [name for name in ("input_ids", "image") if name in dataset.column_names]
    for table in dataset.select_columns([*read, "labels"]).with_format("arrow").iter(DIGESTED_ROWS):
        for column in table.columns:
            rows = column.combine_chunks()
            if not pa.types.is_list(rows.type):  # images are URIs
                digest.update(json.dumps(rows.to_pylist()).encode())
                continue
            digest.update(rows.value_lengths().to_numpy().tobytes() + rows.flatten().to_numpy().tobytes())
    return digest.hexdigest()[:16]
