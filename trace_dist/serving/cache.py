"""Deltas in host memory, so that a task that is asked for again is not read from disk again."""

from __future__ import annotations

from collections import OrderedDict

from trace_dist.bank.bank import DeltaBank
from trace_dist.bank.delta import Delta
from trace_dist.run_folder import DELTA
from trace_dist.utils.names import BASE


class DeltaCache:
    """The deltas that were used last; the least recently used one goes first.

    Args:
        bank: where they are read.
        max_bytes: of all that are kept; one that is larger by itself is read each time.
    """

    def __init__(self, bank: DeltaBank, max_bytes: float) -> None:
        self._bank, self._max_bytes = bank, max_bytes
        self._kept: OrderedDict[str, Delta] = OrderedDict()

    def get(self, task: str) -> Delta | None:
        """A task's delta; None for the base model. Raises ValueError as ``DeltaBank.delta`` does."""
        if task == BASE:
            return None
        digest = self._digest(task)
        delta = self._kept.pop(digest, None) if digest else None
        if delta is None:
            delta = self._bank.delta(task)
        if delta is not None and digest:
            self._keep(digest, delta)
        return delta

    def _digest(self, task: str) -> str | None:
        """Of the file, which a task that is renamed keeps and one that is learned anew does not; banks of version 1 have none."""
        record = self._bank.index.get(task)
        member = record.files.get(DELTA) if record is not None else None
        return member.sha256 if member is not None else None

    def _keep(self, digest: str, delta: Delta) -> None:
        self._kept[digest] = delta
        while sum(kept.nbytes for kept in self._kept.values()) > self._max_bytes:
            self._kept.popitem(last=False)
