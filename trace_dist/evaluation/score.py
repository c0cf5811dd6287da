"""A score, and the one way in which work on examples is split over ranks.

Forward passes of a ZeRO-3 sharded model are collective: a rank that runs one more than the others
hangs the job. So every rank makes the same number of calls; one that has run out of examples repeats the
shortest one and drops the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from trace_dist.utils import dist

T = TypeVar("T")


@dataclass(frozen=True)
class Score:
    """A result over all ranks, equal on every rank.

    ``value``: percent for accuracies (higher is better), bits per byte for text (lower is better).
    ``per_example``: in the order of the examples; 1.0 or 0.0 for accuracies, bits per byte for text.
    """

    value: float
    num: int
    per_example: list[float]


def accuracy(right: Sequence[bool]) -> Score:
    """Percent of examples that are right."""
    return Score(100 * sum(right) / len(right), len(right), [float(each) for each in right])


def map_over_ranks(lengths: Sequence[int], batch_size: int, run: Callable[[list[int]], list[T]]) -> list[T]:
    """Call ``run`` on batches of item indices, as often on every rank, and collect its results everywhere.

    Args:
        lengths: length of each item; batches hold items of similar length, ranks equal shares of each length.
        batch_size: items per call on one rank.
        run: takes indices into ``lengths``, returns one result per index.

    Returns:
        One result per item, in the items' order, on every rank.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    mine = order[dist.rank() :: dist.world_size()]
    num_calls = math.ceil(math.ceil(len(order) / dist.world_size()) / batch_size)
    found: dict[int, T] = {}
    for call in range(num_calls):
        chunk = mine[call * batch_size : (call + 1) * batch_size]
        results = run(chunk or order[-1:])
        found.update(zip(chunk, results, strict=False))  # a filler's chunk is empty: nothing is kept
    merged = {i: result for part in dist.gather_objects(found) for i, result in part.items()}
    return [merged[i] for i in range(len(lengths))]


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; restores the mode.

    Not ``inference_mode``: parameters that a sharding backend gathers inside would stay inference tensors,
    which a later backward pass refuses.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
