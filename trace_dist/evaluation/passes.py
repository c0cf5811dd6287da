"""The one way in which forward passes over examples are shared out among ranks.

Forward passes of a sharded model are collective: a rank that runs one more than the others hangs the job. So every rank makes
the same number of calls; one that has run out of batches repeats the shortest example and drops the result. Where the weights
are held whole meanwhile (``utils.held``), each rank goes on alone. A batch holds the same examples whatever the number of
ranks, so that results are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from trace_dist.models.wrapping import unwrap
from trace_dist.utils import dist
from trace_dist.utils.held import held
from trace_dist.utils.log import progress

T = TypeVar("T")


def map_over_ranks(
    lengths: Sequence[int], batch_size: int, run: Callable[[list[int]], list[T]], alone: bool = False
) -> list[T]:
    """Call ``run`` on batches of item indices, as often on every rank, and collect its results everywhere.

    Args:
        lengths: length of each item; batches hold items of similar length and go to the ranks in turn, the longest first.
        batch_size: items per call on one rank.
        run: takes indices into ``lengths``, returns one result per index; the results are pickled between ranks.
        alone: a rank that has run out of batches calls nothing: ``run`` is not collective.

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
        if not mine and not alone:
            run(order[-1:])
    merged = {i: result for part in dist.gather_objects(found) for i, result in part.items()}
    return [merged[i] for i in range(len(lengths))]


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[bool]:
    """Evaluation mode without gradients; restores the mode. Holds sharded weights whole where they fit. Collective.

    Yields:
        Whether a rank may run forward passes that others do not.

    Not ``inference_mode``: parameters that a sharding backend gathers inside would stay inference tensors,
    which a later backward pass refuses.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), held(unwrap(model)) as alone:
            yield alone
    finally:
        model.train(was_training)
