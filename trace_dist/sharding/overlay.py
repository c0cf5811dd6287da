"""Masked entries over a 4-bit base: values, not differences, that are written into the dequantised weight at each use.

[Note: overlay] NF4 codes never change. Every entry that a mask, a delta or a snapshot has touched lives in the *overlay* of its
weight: compact values in the model's dtype, each on the one rank whose view of the logical weight holds it. Gradient, master and
moments lie beside them as for any weight. A forward or backward pass needs those of all ranks, which are gathered block by block
(sharding/overlay_gathers.py); so all ranks must run the same blocks in the same order, as under ZeRO-3 anyway. A mask that
brings new entries makes the overlay grow, by their dequantised values; ``ShardedModel.release`` drops one that says nothing
the codes do not say.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from trace_kernels.compact import compact_gather, compact_scatter
from trace_kernels.runs import Runs, entries_below

from trace_dist.masks.gaps import Gaps
from trace_dist.sharding.comm import Comm
from trace_dist.sharding.support import Support
from trace_dist.sharding.views import PartitionView


class Overlay:
    """Present values of some entries of one weight.

    Args:
        entries: in the flattened weight (base 0).
        views: what every rank owns of it.
        dense: [numel] the present weight.
        comm: the ranks.
        gather: gives the values of all ranks, end to end, wherever there are several. Collective.

    Attributes:
        comm: the ranks.
        values: [entries of this rank] in the dtype of the weight, in compact order.
        splits: how many each rank has.
        gaps: the entries, encoded: every rank needs all of them, at each use.
    """

    def __init__(
        self,
        entries: Runs,
        views: list[PartitionView],
        dense: Tensor,
        comm: Comm,
        gather: Callable[[], Tensor],
    ) -> None:
        self.comm = comm
        self._gather: Callable[[], Tensor] | None = gather
        """None in a copy of what lay in one process."""
        view = views[comm.rank]
        mine = Runs.clip(entries.units, entries.block, view.start, view.stop, entries.numel)
        edges = [*(each.start for each in views), views[-1].stop]
        self.gaps, self._block, self._numel = Gaps.of(entries.units), entries.block, entries.numel
        self.values = compact_gather(dense[view.start : view.stop], mine).to(dense.dtype)
        self.splits = [
            stop - start for start, stop in pairwise(entries_below(entries.units, entries.block, edges))
        ]
        self._found: WeakKeyDictionary[Support, Runs] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """For a copy of the model, in memory or in a file: without what ties it to this one's view."""
        kept = {name: value for name, value in vars(self).items() if name != "_found"}
        return kept | ({"_gather": None} if self.comm.world == 1 else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _found=WeakKeyDictionary())

    def whole(self) -> Runs:
        """The entries, in the flattened weight (base 0)."""
        return Runs.whole(self.gaps.decode(), self._block, self._numel)

    def __call__(self, weight: Tensor) -> None:
        """Write the values of all ranks into a dense weight. Collective."""
        alone = self._gather is None or self.comm.world == 1
        values = self.values if alone else self._gather()  # type: ignore[misc]
        compact_scatter(weight.view(-1), self.whole(), values)

    def find(self, support: Support) -> Runs | None:
        """Where this rank's entries of a support lie in ``values``; None where some are missing.

        The values of all ranks, end to end, are what the runs call the flattened parameter: where an entry lies there
        does not depend on the number of ranks, nor does what is seeded by it (stochastic rounding).
        """
        if support not in self._found:
            places = _places(support.whole(), self.whole())
            if places is None:
                return None
            start, total = sum(self.splits[: self.comm.rank]), sum(self.splits)
            self._found[support] = Runs.clip(*places, start, start + len(self.values), total)
        return self._found[support]


def _places(some: Runs, all_entries: Runs) -> tuple[Tensor, int] | None:
    """Units, and their length, of ``some`` among the entries ``all_entries``; None where they are not a part of them."""
    block = all_entries.block
    if some.block != block and block != 1:
        return None
    units = some.units if some.block == block else _elements(some)
    places = torch.searchsorted(all_entries.units, units)
    found = all_entries.units[places.clamp(max=all_entries.num_units - 1)]
    if not torch.equal(found, units.to(found.dtype)):
        return None
    if len(units) == all_entries.num_units:  # all of them: one stretch
        return places[:1].to(units.dtype), all_entries.num_entries
    return places.to(units.dtype), block


def union(first: Runs, second: Runs) -> Runs:
    """All entries of two masks of one whole parameter."""
    if first.block == second.block:
        units, block = torch.cat([first.units, second.units]), first.block
    else:
        units, block = torch.cat([_elements(first), _elements(second)]), 1
    return Runs.clip(units.unique(), block, 0, first.numel, first.numel)


def _elements(runs: Runs) -> Tensor:
    return runs.indices().to(torch.int32 if runs.numel < 2**31 else torch.int64)
