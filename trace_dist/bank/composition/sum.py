"""Task arithmetic (Ilharco et al., arXiv 2212.04089): the changes add up."""

from __future__ import annotations

from collections.abc import Sequence

from trace_dist.bank.composition.changes import composed
from trace_dist.bank.delta import Delta
from trace_dist.sharding.base import ShardedModel

label = "sum of the changes"


def compose(deltas: Sequence[Delta], base: ShardedModel, task: str) -> Delta:
    """Base + the sum of the deltas' changes, on the union of their masks. Collective.

    Where masks do not overlap this holds every delta exactly; where they do, changes add up, as in task arithmetic.

    Raises:
        ValueError: they are of different base models or shapes.
    """
    return composed(deltas, base, task, lambda name, changes: changes.sum(0))
