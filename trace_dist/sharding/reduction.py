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

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as td
from torch import Tensor

from trace_dist.utils import dist

if TYPE_CHECKING:
    from trace_dist.sharding.compaction import Accumulate, Support

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
        bucket_bytes: fp32 bytes of one rank's contribution to one exchange.
    """

    def __init__(
        self, supports: list[Support], accumulate: Accumulate, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        self._accumulate = accumulate
        self.local_only = dist.world_size() == 1
        self.bytes_sent = 0
        """Bytes this rank has handed to collectives for other ranks."""
        self._buckets = _fill_buckets(supports, bucket_bytes)
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
        td.all_reduce(late, op=td.ReduceOp.MAX)
        for index in late.nonzero().flatten().tolist():
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
        world, rank = dist.world_size(), dist.rank()
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
        work = td.all_to_all_single(received.view(-1), sent, [sizes[rank]] * world, sizes, async_op=True)
        self.bytes_sent += (len(sent) - sizes[rank]) * sent.element_size()
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


def _fill_buckets(supports: list[Support], bucket_bytes: int) -> list[list[Support]]:
    buckets: list[list[Support]] = []
    size = bucket_bytes
    for support in reversed(supports):
        num_bytes = support.num_entries * support.grad.element_size()
        if size + num_bytes > bucket_bytes:
            buckets.append([])
            size = 0
        buckets[-1].append(support)
        size += num_bytes
    return buckets
