"""Bytes on the wire, by hand: what a rank of a bandwidth-optimal collective sends."""

from __future__ import annotations

import pytest
from engine.rank_wire import LENGTH

pytestmark = pytest.mark.launcher
N = 4 * LENGTH


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_bytes_by_collective(world, num_ranks: int) -> None:
    others = num_ranks - 1
    for rank, report in enumerate(world(num_ranks).reports):
        found = report["wire"]
        assert found["all_gather_into_tensor"] == found["all_gather"] == [others * N, 0]
        assert found["message"] == [N, 0]
        assert found["reduce_scatter_tensor"] == [0, others * N]
        assert found["all_reduce"] == [0, 2 * others / num_ranks * N]
        assert found["broadcast"] == [N if rank == 0 else 0, 0]
        assert found["all_to_all"] == [0, sum(4 * (r + 1) for r in range(num_ranks) if r != rank)]


def test_a_masked_step_sends_what_its_reducer_says(world) -> None:
    for report in world(2).reports:
        counted, said = report["wire"]["step"]
        assert counted == said > 0


def test_an_unknown_collective_is_refused(world) -> None:
    assert "collective='gather_': not known" in world(2).section("wire")["unknown"]
