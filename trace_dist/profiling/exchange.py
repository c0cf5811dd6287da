"""Bytes of weight gradients, and of compact gradients on their way between ranks (``sharding.reduction``), in a backward pass."""

from __future__ import annotations

from collections.abc import Sequence

from trace_dist.sharding.reduction import bucket_bytes_for, cut_buckets


class Exchange:
    """Follows the masked linear layers' gradients in the order in which they are formed.

    Args:
        sizes: (parameter, elements of its gradient that are formed, masked entries, bytes of the mask's indices that are decoded
            to pick the entries out, bytes of indices that are gathered meanwhile), in the order of the model.
        itemsize: bytes of a gradient's element.
        world_size: ranks.
    """

    def __init__(
        self, sizes: Sequence[tuple[str, int, int, int, int]], itemsize: int, world_size: int
    ) -> None:
        self.itemsize, self.world_size = itemsize, world_size
        self.formed = {name: formed for name, formed, *_ in sizes}
        self.compact = {name: 4 * entries for name, _, entries, *_ in sizes}
        self.decoded = {name: num_bytes for name, *_, num_bytes, _ in sizes}
        self._gathered = {name: num_bytes for name, *_, num_bytes in sizes}
        self.indices = 0
        """Bytes of gathered indices."""
        self.held = 0
        """Bytes of compact gradients that wait, and of the buffers of the exchange under way."""
        self._under_way = 0
        names = list(self.compact)
        self._buckets = [
            [names[place] for place in bucket]
            for bucket in cut_buckets(list(self.compact.values()), bucket_bytes_for(world_size))
        ]
        self._delivered: set[str] = set()

    def deliver(self, name: str) -> tuple[int, int]:
        """A weight gradient is formed and handed on.

        Returns:
            Its bytes, and the most bytes of compact gradients and buffers while it exists.
        """
        compact, formed = self.compact[name], self.formed[name] * self.itemsize
        # Whole units are converted and scaled instead of picked out.
        whole_units = 4 * self.formed[name] == compact
        converted = compact if whole_units and self.itemsize < 4 else 0
        if self.world_size == 1:
            return formed, (compact + converted) * whole_units
        self._delivered.add(name)
        self.indices = self._gathered[name]
        self.held += compact
        most = self.held + converted + self.decoded[name]
        while self._buckets and self._delivered.issuperset(self._buckets[0]):
            size = sum(self.compact[other] for other in self._buckets.pop(0))
            self.held -= self._under_way  # what it brought has been added up
            self._under_way = 2 * size  # sent, received
            most = max(most, self.held + self._under_way)
            self.held += self._under_way - size
        return formed, most + self.indices
