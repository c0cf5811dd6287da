"""Sums over ranks: every order of arrival, every bucket size, and the bytes that travel."""

from __future__ import annotations

import pytest

from trace_dist import Mask, shard

pytestmark = pytest.mark.launcher


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_sums_are_exact_in_every_order_of_arrival(world, num_ranks: int) -> None:
    """Late gradients (a module used twice), gradients missing on one rank or on all, and buckets from 64 bytes up."""
    for report in world(num_ranks).reports:
        found = {key: wrong for key, wrong in report["reduction"].items() if "/" in key}
        assert len(found) == 18
        assert found == dict.fromkeys(found, 0)
        assert not report["reduction"]["unreduced"]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_an_exchange_travels_until_the_next_bucket_is_full(world, num_ranks: int) -> None:
    for report in world(num_ranks).reports:
        assert report["reduction"]["under way"] == [False, False, True, False, True, True]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_density_times_the_bytes_of_a_dense_reduce_scatter(world, num_ranks: int) -> None:
    from engine.cases import CASES

    def sent(density: str) -> int:
        return sum(report["reduction"]["bytes"][density] for report in world(num_ranks).reports)

    model = shard(CASES["element"].model(), "single")
    mask = Mask.random(model, 0.05, "element", seed=1)
    assert sent("1.0") == 4 * mask.num_maskable * (num_ranks - 1)
    assert sent("0.05") == 4 * mask.num_entries * (num_ranks - 1)
    assert mask.density == pytest.approx(0.05, rel=0.01)


@pytest.mark.parametrize("backend", ["zero3", "fsdp2"])
def test_a_gradient_that_one_rank_lacks_leaves_every_group_in_one_order(world, backend: str) -> None:
    """Exchanges and gathers run in groups of their own; the sums are right."""
    from engine.rank_withheld import trained

    logs = [report["withheld"][backend]["log"] for report in world(2).reports]
    assert logs[0] == logs[1]
    assert {operation for operation, _ in logs[0]["exchange"]} == {"alltoall_base_", "allreduce_"}
    assert "alltoall_base_" not in {operation for operation, _ in logs[0]["default"]}
    _, expected = trained("single", range(2))
    weights = world(2).section("withheld")[backend]["weights"]
    assert weights.keys() == expected.keys()
    for name, values in expected.items():
        assert weights[name] == pytest.approx(values, abs=1e-6)
