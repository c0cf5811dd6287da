"""One delta out of several, by a composition of this room or of a module of one's own ([Note: drop-in parts]).

A composition is a module with ``label`` and ``compose(deltas, base, task) -> Delta``, which also takes ``options`` where the
module has ``Options``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trace_dist.bank.delta import Delta
from trace_dist.parts import COMPOSITIONS
from trace_dist.sharding.base import ShardedModel


def compose(
    deltas: Sequence[Delta],
    base: ShardedModel,
    task: str,
    kind: str = "sum",
    options: Mapping[str, Any] | None = None,
) -> Delta:
    """One delta that stands for several. Collective.

    Args:
        deltas: of one base model.
        base: the model, holding its own values.
        task: name of the result.
        kind: name of a composition, or the path of a module.
        options: its options.

    Raises:
        ValueError: no deltas, they do not go together, or there is no such composition.
    """
    if not deltas:
        raise ValueError("deltas: there are none to compose; give at least one")
    chosen = COMPOSITIONS.options(kind, options)
    extra = {} if chosen is None else {"options": chosen}
    result: Delta = COMPOSITIONS.load(kind).compose(deltas, base, task, **extra)
    return result
