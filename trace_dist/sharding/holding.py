"""Backends whose forward pass gathers weights can gather all of them once, for many passes without backward.

Decoding reads the whole model for every token. Where it fits it is gathered before the first one, and each rank then decodes
at its own pace.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from math import prod

from torch import nn

from trace_dist.sharding.base import ShardedModel
from trace_dist.utils.held import fits, offer


class HoldingModel(ShardedModel):
    """A sharded model that can be held whole."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._is_held = False
        offer(self.module, self.hold)

    def indices_may_leave(self, name: str) -> bool:
        # An overlay is written into a weight at each use.
        return name not in self._quantized

    def check_current(self) -> None:
        # Nothing is replaced while all is held, and to look would drop what FSDP2 holds.
        if not self._is_held:
            super().check_current()

    @contextmanager
    def hold(self) -> Iterator[bool]:
        """Gather all weights for as long as the block lasts, where they fit (``utils.held``). Collective.

        Yields:
            Whether they are held, and a forward pass calls no collective. NF4 weights are not: each of their uses exchanges
            the entries of an overlay.
        """
        if self._is_held or self._quantized or not fits(self._missing_bytes()):
            yield self._is_held
            return
        with self._gather_all():
            self._is_held = True
            try:
                yield True
            finally:
                self._is_held = False

    @abstractmethod
    def _gather_all(self) -> AbstractContextManager[None]:
        """All weights whole, and no collective in a forward pass, inside the block. Collective."""

    def _missing_bytes(self) -> int:
        """What the whole model takes on a rank."""
        return sum(prod(self.shape(name)) * self.like(name).element_size() for name in self._parameters)
