"""Compact gradient reduction: only masked entries travel between ranks.

Each rank holds its own gradient at all masked entries of a parameter. The entries are sorted, so they are the concatenation of
the ranks' supports: one all-to-all with uneven splits sends every entry to its owner, which adds the contributions in
fp32 in rank order (deterministic). Parameters are exchanged in buckets during the backward pass: an exchange is started when its
bucket is full and awaited when the next one is, so that on an accelerator it travels while backward goes on computing.

Collectives must be called equally often, in one order, on every rank. So buckets are fixed when the mask is attached, are
flushed in that order, each exactly once per backward; a gradient that arrives after its bucket was flushed (a module that
runs twice) is exchanged in a last round that all ranks agree on. A gradient that is missing on some rank counts as zero. Its
bucket is then exchanged earlier on the others, so the module must not gather weights (ZeRO-3) between the two moments;
ZeRO-3 itself asks for more: every rank runs the same modules in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trace_dist.sharding.comm import Comm
from trace_dist.sharding.support import Accumulate, Support

BUCKET_BYTES = 32 * 2**20


@dataclass(frozen=True)
class _Exchange:
    """An all-to-all under way. ``received``: [world, entries of this rank]; ``sent`` lives until it has left."""

    bucket: list[Support]
    sent: Tensor
    received: Tensor
    work: Any


class CompactReducer:
    """Sums compact gradients over ranks.

    Args:
        supports: in parameter order; buckets are filled from the last (backward runs from the end).
        accumulate: receives each support's reduced gradient at this rank's entries.
        comm: the ranks.
        bucket_bytes: fp32 bytes of one rank's contribution to one exchange.
    """

    def __init__(
        self,
        supports: list[Support],
        accumulate: Accumulate,
        comm: Comm,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self._accumulate, self._comm = accumulate, comm
        self.local_only = comm.world == 1
        sizes = [support.num_entries * support.grad.element_size() for support in supports]
        self._buckets = [[supports[i] for i in bucket] for bucket in cut_buckets(sizes, bucket_bytes)]
        self._bucket_of = {id(support): i for i, bucket in enumerate(self._buckets) for support in bucket}
        self._values: dict[int, Tensor] = {}  # id(support) -> [whole entries], not yet exchanged
        self._next = 0
        self._in_flight: _Exchange | None = None

    def add(self, support: Support, values: Tensor) -> None:
        """Take this rank's gradient at all masked entries of a parameter: [whole.num_entries] in the buffer's dtype."""
        if self.local_only:
            self._accumulate(support, values)
            return
        held = self._values.get(id(support))
        self._values[id(support)] = values if held is None else held.add_(values)
        while self._next < len(self._buckets) and self._is_ready(self._buckets[self._next]):
            self._flush(self._buckets[self._next])
            self._next += 1

    def finish(self) -> None:
        """Exchange what is left; call once after each backward pass, on every rank."""
        if self.local_only or not self._buckets:
            return
        for bucket in self._buckets[self._next :]:
            self._flush(bucket)
        self._next = 0
        late = torch.zeros(len(self._buckets), dtype=torch.int32, device=self._device)
        for key in self._values:
            late[self._bucket_of[key]] = 1
        for index in self._comm.max(late).nonzero().flatten().tolist():
            self._flush(self._buckets[index])
        self._complete()

    def discard(self) -> None:
        """Forget the gradients of a backward pass that was cut short, on every rank."""
        if self._in_flight is not None:
            self._in_flight.work.wait()
            self._in_flight = None
        self._values.clear()
        self._next = 0

    @property
    def has_unreduced(self) -> bool:
        """Whether gradients came since the last ``finish``."""
        return bool(self._values) or self._next > 0 or self._in_flight is not None

    @property
    def _device(self) -> torch.device:
        return self._buckets[0][0].grad.device

    def _is_ready(self, bucket: list[Support]) -> bool:
        return all(id(support) in self._values for support in bucket)

    def _flush(self, bucket: list[Support]) -> None:
        """Start one all-to-all for the supports of a bucket; a gradient that never came counts as zero."""
        self._complete()
        world, rank = self._comm.world, self._comm.rank
        dtype = bucket[0].grad.dtype
        parts: list[list[Tensor]] = [[] for _ in range(world)]
        for support in bucket:
            values = self._values.pop(id(support), None)
            if values is None:
                values = torch.zeros(support.num_entries, dtype=dtype, device=self._device)
            for target, part in enumerate(values.split(support.splits)):
                parts[target].append(part)
        sent = torch.cat([part for target in parts for part in target])
        sizes = [sum(len(part) for part in target) for target in parts]
        received = torch.empty(world, sizes[rank], dtype=dtype, device=self._device)
        work = self._comm.all_to_all(received.view(-1), sent, [sizes[rank]] * world, sizes)
        self._in_flight = _Exchange(bucket, sent, received, work)

    def _complete(self) -> None:
        """Wait for the exchange that is under way, if any, and add up what came."""
        if self._in_flight is None:
            return
        exchange, self._in_flight = self._in_flight, None
        exchange.work.wait()
        total = exchange.received[0]
        for contribution in exchange.received[1:]:
            total += contribution
        for support, part in zip(
            exchange.bucket, total.split([s.runs.num_entries for s in exchange.bucket]), strict=True
        ):
            self._accumulate(support, part)


def cut_buckets(sizes: Sequence[int], bucket_bytes: int = BUCKET_BYTES) -> list[list[int]]:
    """Places in ``sizes`` (bytes per parameter, in the model's order) by bucket, from the last, where backward begins."""
    buckets: list[list[int]] = []
    filled = bucket_bytes
    for place in reversed(range(len(sizes))):
        if filled + sizes[place] > bucket_bytes:
            buckets.append([])
            filled = 0
        buckets[-1].append(place)
        filled += sizes[place]
    return buckets
