"""The one way in which forward passes over examples are shared out among ranks.

Forward passes of a ZeRO-3 sharded model are collective: a rank that runs one more than the others
hangs the job. So every rank makes the same number of calls; one that has run out of batches repeats the
shortest example and drops the result. A batch holds the same examples whatever the number of ranks, so that results
are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from trace_dist.utils import dist
from trace_dist.utils.log import progress

T = TypeVar("T")


def map_over_ranks(lengths: Sequence[int], batch_size: int, run: Callable[[list[int]], list[T]]) -> list[T]:
    """Call ``run`` on batches of item indices, as often on every rank, and collect its results everywhere.

    Args:
        lengths: length of each item; batches hold items of similar length and go to the ranks in turn, the longest first.
        batch_size: items per call on one rank.
        run: takes indices into ``lengths``, returns one result per index; the results are pickled between ranks.

    Returns:
        One result per item, in the items' order, on every rank.

    Raises:
        ValueError: a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1; use for example 32")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    found: dict[int, T] = {}
    rounds = range(0, len(batches), dist.world_size())
    for first in progress(rounds, "batches of examples", total=len(rounds)):
        mine = batches[first + dist.rank() :][:1]
        for batch in mine:
            found.update(zip(batch, run(batch), strict=True))
        if not mine:
            run(order[-1:])
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
