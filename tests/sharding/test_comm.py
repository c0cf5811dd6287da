"""Through the seam of collectives: ranks that are threads of this process, and an exchange that fails."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Condition
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from trace_dist.masks import Mask, UnitLayout
from trace_dist.sharding import reduction
from trace_dist.sharding.comm import Comm
from trace_dist.sharding.reduction import CompactReducer
from trace_dist.sharding.support import Support, add_to_grad, build_supports
from trace_dist.sharding.views import PartitionView, flat_views

SHAPES = {"a": (4, 6), "b": (5, 3), "c": (7,)}
WORLD = 3
PATIENCE = 10
"""Seconds that a rank waits for the others."""


class Meeting:
    """Where threads leave what they send to each other; a rank that waits too long for the others fails."""

    def __init__(self) -> None:
        self._left: dict[Any, dict[int, Any]] = {}
        self._changed = Condition()

    def leave(self, key: Any, rank: int, mine: Any) -> None:
        with self._changed:
            self._left.setdefault(key, {})[rank] = mine
            self._changed.notify_all()

    def is_complete(self, key: Any) -> bool:
        return len(self._left[key]) == WORLD

    def everyone(self, key: Any) -> list[Any]:
        with self._changed:
            if not self._changed.wait_for(lambda: self.is_complete(key), timeout=PATIENCE):
                raise TimeoutError(f"{key}: only ranks {sorted(self._left[key])} came")
            return [self._left[key][rank] for rank in range(WORLD)]


class ThreadComm(Comm):
    """One of several ranks that are threads. ``log``: (group, operation, size) of what it began, in order."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self._rank, self._meeting = rank, meeting
        self.log: list[tuple[str, str, int]] = []

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world(self) -> int:
        return WORLD

    def open(self) -> None:
        """Nothing."""

    def all_to_all(
        self, received: Tensor, sent: Tensor, receive_sizes: list[int], send_sizes: list[int]
    ) -> Any:
        key = self._begin("exchange", "all_to_all", sent.split(send_sizes))

        def wait() -> None:
            received.copy_(torch.cat([parts[self.rank] for parts in self._meeting.everyone(key)]))

        return SimpleNamespace(wait=wait, is_completed=lambda: self._meeting.is_complete(key))

    def any(self, flags: Sequence[bool]) -> list[bool]:
        everyone = self._meeting.everyone(self._begin("exchange", "any", list(flags)))
        return [any(said) for said in zip(*everyone, strict=True)]

    def gather_weights(self) -> None:
        """What a sharding library does between two modules: no rank goes on before all are here."""
        self._meeting.everyone(self._begin("gathers", "all_gather", [0]))

    def _begin(self, group: str, operation: str, mine: Sequence[Any]) -> Any:
        self.log.append((group, operation, len(mine)))
        key = group, sum(other == group for other, *_ in self.log)
        self._meeting.leave(key, self.rank, mine)
        return key


class FailsOnce(ThreadComm):
    """The first exchange is lost on its way."""

    lost = False

    def all_to_all(
        self, received: Tensor, sent: Tensor, receive_sizes: list[int], send_sizes: list[int]
    ) -> Any:
        if not self.lost:
            self.lost = True
            raise ConnectionError("lost")
        return super().all_to_all(received, sent, receive_sizes, send_sizes)

    def gather_weights(self) -> None:
        """Nothing: the ranks fail at different places."""


class Flat:
    """Parameters cut as ZeRO-3 cuts them, of which no value is ever asked for."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def names(self) -> list[str]:
        return list(SHAPES)

    def shape(self, name: str) -> tuple[int, ...]:
        return SHAPES[name]

    def views(self, name: str) -> list[PartitionView]:
        numel = torch.Size(SHAPES[name]).numel()
        return flat_views(numel, -(-numel // WORLD), WORLD)

    def like(self, name: str) -> Tensor:
        return torch.empty(0)


def supports_of(rank: int) -> list[Support]:
    units = {"a": [0, 5, 6, 23], "b": [1, 2, 14], "c": [3]}
    layouts = {name: UnitLayout(shape, 1) for name, shape in SHAPES.items()}
    mask = Mask({n: torch.tensor(u, dtype=torch.int32) for n, u in units.items()}, layouts, "element")
    supports = build_supports(Flat(rank), mask)
    for support in supports:
        support.grad = torch.zeros(support.runs.num_entries)
    return supports


def contribution(support: Support, rank: int) -> Tensor:
    return torch.arange(1.0, support.num_entries + 1) * 10**rank


def reduce(kind: type[ThreadComm], bucket_bytes: int) -> list[list[Support]]:
    """Every rank's supports after a pass in which rank r alone has no gradient of parameter r, and weights are gathered between
    any two gradients."""
    meeting, comms = Meeting(), dict[int, ThreadComm]()

    def one(rank: int) -> list[Support]:
        supports = supports_of(rank)
        comm = comms[rank] = kind(rank, meeting)
        reducer = CompactReducer(supports, add_to_grad, comm, torch.device("cpu"), bucket_bytes)

        def backward() -> list[bool]:
            for place in reversed(range(len(supports))):
                comm.gather_weights()
                if place != rank:
                    reducer.add(supports[place], contribution(supports[place], rank))
            return reducer.finish([rank == place for place in range(WORLD + 1)])

        try:
            flags = backward()
        except ConnectionError:
            assert reducer.has_unreduced
            reducer.discard()
            for support in supports:
                support.grad.zero_()
            flags = backward()
        assert not reducer.has_unreduced
        assert flags == [True] * WORLD + [False]
        return supports

    with ThreadPoolExecutor(WORLD) as pool:
        found = list(pool.map(one, range(WORLD)))
    for group in ("exchange", "gathers"):
        first, *others = [[each for each in comms[rank].log if each[0] == group] for rank in range(WORLD)]
        assert all(other == first for other in others)
    return found


@pytest.mark.parametrize("kind", [ThreadComm, FailsOnce])
@pytest.mark.parametrize("bucket_bytes", [4, 20, 2**20])
@pytest.mark.parametrize("most_pieces", [0, reduction.MOST_PIECES])
def test_sums_over_ranks(
    kind: type[ThreadComm], bucket_bytes: int, most_pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the host puts a bucket in order."""
    monkeypatch.setattr(reduction, "MOST_PIECES", most_pieces)
    for place, parts in enumerate(zip(*reduce(kind, bucket_bytes), strict=True)):
        expected = sum(contribution(parts[0], rank) for rank in range(WORLD) if rank != place)
        assert torch.equal(torch.cat([part.grad for part in parts]), expected)
