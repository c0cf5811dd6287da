"""The largest change wins: each entry takes the change of the delta that moved it farthest.

As in the merging of experts by magnitude (the "max" of MagMax, Marczak et al., arXiv 2407.06322).
"""

from __future__ import annotations

from collections.abc import Sequence

from trace_dist.bank.composition.changes import composed
from trace_dist.bank.delta import Delta
from trace_dist.sharding.base import ShardedModel

label = "largest change of each entry"


def compose(deltas: Sequence[Delta], base: ShardedModel, task: str) -> Delta:
    """Base + the change of greatest magnitude at each entry, on the union of the masks; of equals the first one. Collective.

    Raises:
        ValueError: they are of different base models or shapes.
    """
    return composed(
        deltas, base, task, lambda name, changes: changes.gather(0, changes.abs().argmax(0, keepdim=True))[0]
    )
