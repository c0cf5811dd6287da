"""The average of the tuned models (Wortsman et al., arXiv 2203.05482); an entry that a delta does not hold is the base's."""

from __future__ import annotations

from collections.abc import Sequence

from trace_dist.bank.composition.changes import composed
from trace_dist.bank.delta import Delta
from trace_dist.sharding.base import ShardedModel

label = "average of the models"


def compose(deltas: Sequence[Delta], base: ShardedModel, task: str) -> Delta:
    """Base + the mean of the deltas' changes, on the union of their masks. Collective.

    Raises:
        ValueError: they are of different base models or shapes.
    """
    return composed(deltas, base, task, lambda name, changes: changes.mean(0))
