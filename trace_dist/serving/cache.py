"""Deltas in host memory, ready for the model, so that a task that is asked for again takes one pass over its values.

With each the base's values at its entries are kept ([Note: own values] in bank/swap.py), as long as there is room for both.
"""

from __future__ import annotations

from collections import OrderedDict

from trace_dist.bank.bank import DeltaBank
from trace_dist.bank.delta import made_ready
from trace_dist.bank.swap import Swap
from trace_dist.sharding.base import ShardedModel
from trace_dist.utils import dist
from trace_dist.utils.names import BASE


class DeltaCache:
    """The deltas that were used last; the least recently used one goes first, and before it the base's values beside deltas.

    Args:
        bank: where they are read.
        model: which they are put into; it holds the base whenever they are.
        max_bytes: of all that are kept, indices included; one that is larger by itself is read each time.
    """

    def __init__(self, bank: DeltaBank, model: ShardedModel, max_bytes: float) -> None:
        self._bank, self._model, self._max_bytes = bank, model, max_bytes
        self._kept: OrderedDict[str, Swap] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """Of all that are kept."""
        return sum(swap.nbytes for swap in self._kept.values())

    def get(self, task: str) -> Swap | None:
        """A task's delta; None for the base model. The model must hold the base.

        Raises:
            ValueError: as ``DeltaBank.delta_on`` and ``Swap`` do.
        """
        if task == BASE:
            return None
        digest = self._digest(task)
        if digest is not None and digest in self._kept:
            self._kept.move_to_end(digest)
            return self._kept[digest]
        delta = self._bank.delta_on(task, self._model)
        if delta is None:
            return None
        swap = made_ready(self._model, delta)
        if digest is not None and self._fits(swap.nbytes):
            self._keep(digest, swap)
        return swap

    def _digest(self, task: str) -> str | None:
        """Of the file, and of its recipe where it has one. A task that is renamed keeps it, one that is learned anew does not.

        Banks of version 1 have none."""
        record = self._bank.index.get(task)
        delta, recipe = record.key if record is not None else (None, None)
        return delta if recipe is None else f"{delta}+{recipe}"

    def _keep(self, digest: str, swap: Swap) -> None:
        self._kept[digest] = swap
        swap.keep_own()
        while not self._fits(self.num_bytes):
            spare = next((each for each in self._kept.values() if each.keeps_own), None)
            if spare is None:
                self._kept.popitem(last=False)
            else:
                spare.forget_own()

    def _fits(self, num_bytes: int) -> bool:
        """Whether so many bytes may be kept, here and on the other ranks, which must decide alike."""
        return dist.max_over_ranks(num_bytes) <= self._max_bytes
