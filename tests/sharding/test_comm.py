"""Through the seam of collectives: ranks that are threads of this process, and an exchange that fails."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from trace_dist.masks import Mask, UnitLayout
from trace_dist.sharding.comm import Comm
from trace_dist.sharding.reduction import CompactReducer
from trace_dist.sharding.support import Support, add_to_grad, build_supports
from trace_dist.sharding.views import PartitionView, flat_views

SHAPES = {"a": (4, 6), "b": (5, 3), "c": (7,)}
WORLD = 3


class Meeting:
    """Where threads leave what they send to each other."""

    def __init__(self) -> None:
        self.barrier = Barrier(WORLD, timeout=60)
        self.left: list[Any] = [None] * WORLD


class ThreadComm(Comm):
    """One of several ranks that are threads."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self._rank, self._meeting = rank, meeting

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world(self) -> int:
        return WORLD

    def all_to_all(
        self, received: Tensor, sent: Tensor, receive_sizes: list[int], send_sizes: list[int]
    ) -> Any:
        everyone = self._exchange(sent.split(send_sizes))
        received.copy_(torch.cat([parts[self.rank] for parts in everyone]))
        return SimpleNamespace(wait=lambda: None)

    def max(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._exchange(tensor.clone())).amax(0)

    def _exchange(self, mine: Any) -> list[Any]:
        self._meeting.left[self.rank] = mine
        self._meeting.barrier.wait()
        everyone = list(self._meeting.left)
        self._meeting.barrier.wait()
        return everyone


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
    """Every rank's supports after a pass in which rank r alone has no gradient of parameter r, and the flags it was told."""
    meeting = Meeting()

    def one(rank: int) -> list[Support]:
        supports = supports_of(rank)
        reducer = CompactReducer(
            supports, add_to_grad, kind(rank, meeting), torch.device("cpu"), bucket_bytes
        )

        def backward() -> list[bool]:
            for place in reversed(range(len(supports))):
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
        return list(pool.map(one, range(WORLD)))


@pytest.mark.parametrize("kind", [ThreadComm, FailsOnce])
@pytest.mark.parametrize("bucket_bytes", [4, 20, 2**20])
def test_sums_over_ranks(kind: type[ThreadComm], bucket_bytes: int) -> None:
    for place, parts in enumerate(zip(*reduce(kind, bucket_bytes), strict=True)):
        expected = sum(contribution(parts[0], rank) for rank in range(WORLD) if rank != place)
        assert torch.equal(torch.cat([part.grad for part in parts]), expected)
