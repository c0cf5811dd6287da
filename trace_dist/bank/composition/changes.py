"""The common part of compositions: the deltas' changes of one parameter, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trace_dist.bank.delta import Delta, check_dtype, extract_delta
from trace_dist.masks.ops import union
from trace_dist.sharding.base import ShardedModel

Rule = Callable[[str, Tensor], Tensor]
"""Name of a parameter, the deltas' changes [deltas, entries] float64, 0 where a delta does not hold an entry ->
change [entries] float64."""


def composed(deltas: Sequence[Delta], base: ShardedModel, task: str, rule: Rule) -> Delta:
    """One delta on the union of several masks, which may be of different granularities. Collective.

    Where a single delta holds an entry and the rule leaves its change as it is, so is the value, bit for bit.

    Args:
        deltas: of one base model.
        base: the model, holding its own values.
        task: name of the result.
        rule: how changes become one.

    Raises:
        ValueError: they are of different base models, shapes or dtypes.
    """
    mask = union([delta.mask for delta in deltas]).with_meta(task=task, method="composed")
    start = extract_delta(base, mask, task)
    for delta in deltas:
        for name in delta.values:
            check_dtype(delta, name, start.values[name].dtype)
    values = {name: _value(deltas, name, mask.elements(name), start.values[name], rule) for name in mask}
    return Delta(start.mask, values, task)


def _value(deltas: Sequence[Delta], name: str, entries: Tensor, own: Tensor, rule: Rule) -> Tensor:
    """``own`` [entries] plus what a rule makes of the deltas' changes."""
    tuned = own.repeat(len(deltas), 1)
    held = torch.zeros(tuned.shape, dtype=torch.bool)
    for index, delta in enumerate(deltas):
        if name in delta.mask.units:
            place = torch.searchsorted(entries, delta.mask.elements(name))
            tuned[index, place], held[index, place] = delta.values[name], True
    changes = tuned.double() - own.double()
    change = rule(name, changes)
    # own + (tuned - own) may differ from tuned in the last bit
    alone = (held.sum(0) == 1) & (change == changes.sum(0))
    kept = tuned.gather(0, held.int().argmax(0, keepdim=True))[0]
    return torch.where(alone, kept, (own.double() + change).to(own.dtype))
