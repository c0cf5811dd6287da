"""Task arithmetic (Ilharco et al., arXiv 2212.04089): the changes add up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trace_dist.bank.delta import Delta, extract_delta
from trace_dist.masks.ops import combine
from trace_dist.sharding.base import ShardedModel

label = "sum of the changes"


def compose(deltas: Sequence[Delta], base: ShardedModel, task: str) -> Delta:
    """One delta whose values are base + the sum of the deltas' changes, on the union of their masks. Collective.

    Where masks do not overlap this holds every delta exactly; where they do, changes add up, as in task arithmetic.

    Raises:
        ValueError: they are of different base models, granularities or shapes.
    """
    mask = deltas[0].mask
    for other in deltas[1:]:
        mask = combine(mask, other.mask, "union")
    mask = mask.with_meta(task=task, method="composed")
    start = extract_delta(base, mask, task)
    values = {name: _add_changes(deltas, name, mask.elements(name), start.values[name]) for name in mask}
    return Delta(mask, values, task)


def _add_changes(deltas: Sequence[Delta], name: str, entries: Tensor, own: Tensor) -> Tensor:
    """``own`` [entries] plus the deltas' changes of one parameter."""
    places = {
        index: torch.searchsorted(entries, delta.mask.elements(name))
        for index, delta in enumerate(deltas)
        if name in delta.mask.units
    }
    total, times = own.double().clone(), torch.zeros(len(own), dtype=torch.int32)
    for index, place in places.items():
        total[place] += deltas[index].values[name].double() - own[place].double()
        times[place] += 1
    result = total.to(own.dtype)
    # own + (tuned - own) may differ from tuned in the last bit
    for index, place in places.items():
        once = times[place] == 1
        result[place[once]] = deltas[index].values[name][once]
    return result
