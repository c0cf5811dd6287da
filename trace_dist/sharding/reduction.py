"""Compact gradient reduction: only masked entries travel between ranks.

Each rank holds its own gradient at all masked entries of a parameter. The entries are sorted, so they are the concatenation of
the ranks' supports: one all-to-all with uneven splits sends every entry to its owner, which adds the contributions in fp32,
always in one order. Parameters are exchanged in buckets during the backward pass: an exchange is started when its bucket is
full, travels while backward goes on computing, and is added up when a later bucket is full and it has arrived.

Collectives must be called equally often, in one order, on every rank. So buckets are fixed when the mask is attached, are
flushed in that order, each exactly once per backward; a gradient that arrives after its bucket was flushed (a module that
runs twice) is exchanged in a last round that all ranks agree on. A gradient that is missing on some rank counts as zero: that
rank flushes its bucket, and those behind it, at the end of the pass.

[Note: no waiting] The other ranks have then begun the same exchange earlier, and between the two moments weights are gathered. So
exchanges have a process group of their own ([Note: two groups] in sharding/comm.py), and no rank waits for one before its
backward pass has ended: neither the host, in whose absence the late rank would wait for its part of a gather for ever, nor the
stream that computes, for which DeepSpeed's host and FSDP2's gathers wait. What is on its way meanwhile is at most the gradient
of all masked entries, twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trace_dist.sharding.comm import Comm
from trace_dist.sharding.support import Accumulate, Support
from trace_dist.utils import devices

BUCKET_BYTES = 32 * 2**20
MESSAGE_BYTES = 32 * 2**10
"""What a bucket has at least for each rank, or the time of many small messages would count."""
MOST_PIECES = 256
"""Parameters times ranks of a bucket that the host puts in order piece by piece; for a thousand ranks that would take seconds."""


class _Bucket:
    """Parameters whose gradients travel together.

    Args:
        supports: theirs.
        device: where the gradients lie.

    Attributes:
        sizes: entries of each rank, of all of them together.
    """

    def __init__(self, supports: list[Support], device: torch.device) -> None:
        self.supports = supports
        self.sizes = [sum(sizes) for sizes in zip(*(support.splits for support in supports), strict=True)]
        self._moves: tuple[Tensor, Tensor] | None = None
        if len(supports) > 1 and len(supports) * len(self.sizes) > MOST_PIECES:
            pieces = torch.tensor([support.splits for support in supports])
            begins = (pieces.flatten().cumsum(0) - pieces.flatten()).view_as(pieces)
            lengths = pieces.T.flatten()
            ends = lengths.cumsum(0)
            moves = begins.T.flatten() - (ends - lengths)
            self._moves = devices.sent(moves.int(), device), devices.sent(ends.int(), device)

    def by_rank(self, values: Sequence[Tensor]) -> Tensor:
        """What is sent, [entries]: rank 0's of each parameter in turn, then rank 1's, and so on; ``values``: by parameter."""
        if len(values) == 1:
            return values[0]
        if self._moves is None:
            pieces = [each.split(support.splits) for each, support in zip(values, self.supports, strict=True)]
            return torch.cat([piece for of_rank in zip(*pieces, strict=True) for piece in of_rank])
        (moves, ends), whole = self._moves, torch.cat(list(values))
        places = torch.arange(len(whole), dtype=torch.int32, device=whole.device)
        piece = torch.bucketize(places, ends, right=True, out_int32=True)
        return whole.index_select(0, places + moves.index_select(0, piece))


@dataclass(frozen=True)
class _Exchange:
    """An all-to-all under way. ``received``: [world, entries of this rank]; ``sent`` lives until it has left."""

    bucket: _Bucket
    sent: Tensor
    received: Tensor
    work: Any


class CompactReducer:
    """Sums compact gradients over ranks.

    Args:
        supports: in parameter order; buckets are filled from the last (backward runs from the end).
        accumulate: receives each support's reduced gradient at this rank's entries.
        comm: the ranks.
        device: where the gradients lie.
        bucket_bytes: fp32 bytes of one rank's contribution to one exchange; ``bucket_bytes_for`` the ranks where it is None.
    """

    def __init__(
        self,
        supports: list[Support],
        accumulate: Accumulate,
        comm: Comm,
        device: torch.device,
        bucket_bytes: int | None = None,
    ) -> None:
        comm.open()
        self._accumulate, self._comm, self._device = accumulate, comm, device
        self.local_only = comm.world == 1
        sizes = [support.num_entries * support.grad.element_size() for support in supports]
        size = bucket_bytes_for(comm.world) if bucket_bytes is None else bucket_bytes
        cut = [[supports[i] for i in bucket] for bucket in cut_buckets(sizes, size)]
        self._buckets = [_Bucket(bucket, device) for bucket in cut]
        self._bucket_of = {id(support): i for i, bucket in enumerate(cut) for support in bucket}
        self._values: dict[int, Tensor] = {}  # id(support) -> [whole entries], not yet exchanged
        self._next = 0
        self._in_flight: deque[_Exchange] = deque()
        self._sums: list[Tensor] = []
        """Of what each rank has sent here, [world] by exchange, since the last ``discard``."""
        self.has_unreduced = False
        """Whether gradients came, or were being exchanged, since the last ``finish`` that came to its end."""

    def add(self, support: Support, values: Tensor) -> None:
        """Take this rank's gradient at all masked entries of a parameter: [whole.num_entries] in the buffer's dtype."""
        if self.local_only:
            self._accumulate(support, values)
            return
        self.has_unreduced = True
        held = self._values.get(id(support))
        self._values[id(support)] = values if held is None else held.add_(values)
        while self._next < len(self._buckets) and self._is_ready(self._buckets[self._next]):
            self._flush(self._buckets[self._next])
            self._next += 1

    def finish(self, flags: Sequence[bool]) -> list[bool]:
        """Exchange what is left; call once after each backward pass, on every rank.

        Args:
            flags: as many on every rank; they travel with the message that is sent anyway.

        Returns:
            Which of the flags some rank has set.
        """
        if self.local_only:
            return list(flags)
        self.has_unreduced = True
        for bucket in self._buckets[self._next :]:
            self._flush(bucket)
        self._next = 0
        late = [False] * len(self._buckets)
        for key in self._values:
            late[self._bucket_of[key]] = True
        agreed = self._comm.any([*late, *flags])
        for bucket, is_late in zip(self._buckets, agreed, strict=False):
            if is_late:
                self._flush(bucket)
        self._collect(wait=True)
        self.has_unreduced = False
        return agreed[len(late) :]

    def discard(self) -> None:
        """Forget the gradients of a backward pass that was cut short, on every rank."""
        while self._in_flight:
            self._in_flight.popleft().work.wait()
        self._values.clear()
        self._sums.clear()
        self._next = 0
        self.has_unreduced = False

    def senders_not_finite(self) -> list[int]:
        """The ranks that have sent an infinite or NaN gradient for an entry of this rank since the last ``discard``.

        A rank's sum tells it, which is formed beside the addition; nobody looks at it before something is wrong.
        """
        if not self._sums:
            return []
        return (~torch.stack(self._sums).sum(0).isfinite()).nonzero().flatten().tolist()

    def _is_ready(self, bucket: _Bucket) -> bool:
        return all(id(support) in self._values for support in bucket.supports)

    def _flush(self, bucket: _Bucket) -> None:
        """Start one all-to-all for the supports of a bucket; a gradient that never came counts as zero."""
        self._collect(wait=False)
        world, mine = self._comm.world, bucket.sizes[self._comm.rank]
        dtype = bucket.supports[0].grad.dtype
        values = []
        for support in bucket.supports:
            held = self._values.pop(id(support), None)
            if held is None:
                held = torch.zeros(support.num_entries, dtype=dtype, device=self._device)
            values.append(held)
        sent = bucket.by_rank(values)
        received = torch.empty(world, mine, dtype=dtype, device=self._device)
        work = self._comm.all_to_all(received.view(-1), sent, [mine] * world, bucket.sizes)
        self._in_flight.append(_Exchange(bucket, sent, received, work))

    def _collect(self, wait: bool) -> None:
        """Add up what has come, in the order of the buckets; all that is under way where ``wait`` ([Note: no waiting])."""
        while self._in_flight and (wait or self._in_flight[0].work.is_completed()):
            exchange = self._in_flight.popleft()
            exchange.work.wait()
            self._sums.append(exchange.received.sum(1))
            total = _sum(exchange.received)
            supports = exchange.bucket.supports
            parts = total.split([support.runs.num_entries for support in supports])
            for support, part in zip(supports, parts, strict=True):
                self._accumulate(support, part)


def _sum(received: Tensor) -> Tensor:
    """Of all ranks' contributions, [world, n]: always in one order, on a CPU that of the ranks. [n].

    An accelerator does it in one launch, however many ranks there are; one addition after the other would take as many as these.
    """
    if received.device.type != "cpu":
        return received.sum(0)
    total = received[0]
    for contribution in received[1:]:
        total += contribution
    return total


def bucket_bytes_for(world: int) -> int:
    """Bytes of one rank's contribution to one exchange between so many ranks."""
    return max(BUCKET_BYTES, world * MESSAGE_BYTES)


def cut_buckets(sizes: Sequence[int], bucket_bytes: int) -> list[list[int]]:
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
