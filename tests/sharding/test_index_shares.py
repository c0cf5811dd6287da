"""Indices of all ranks' entries, shared out: the same weights to the last bit, less memory, every gather once on every rank."""

from __future__ import annotations

import pytest
import torch
from engine.rank_shared import SHARED

from trace_dist.sharding.index_shares import ALIGNED, BLOCK_BYTES, worth_sharing


@pytest.mark.launcher
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("name", SHARED)
def test_training_has_the_bits_of_ranks_that_keep_all(world, num_ranks: int, name: str) -> None:
    found = world(num_ranks)
    for backend, whole in (("zero3", name), ("fsdp2", f"fsdp2-{name}")):
        expected, state = found.state(whole), found.state(f"shared-{backend}-{name}")
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], value) for key, value in expected.items())


@pytest.mark.launcher
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_each_rank_keeps_its_part(world, num_ranks: int) -> None:
    for report in world(num_ranks).reports:
        kept = report["shared"]["kept"]
        part = (kept["whole"] - kept["own"]) / num_ranks
        # Of two blocks of seven matrices, each of which begins at an aligned byte.
        assert part <= kept["shared"] - kept["own"] <= part + 2 * 7 * ALIGNED


@pytest.mark.launcher
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_block_that_runs_twice_wants_its_indices_again(world, num_ranks: int) -> None:
    """In the first pass it does so when they are gone; in the next one they stay until the end."""
    for report in world(num_ranks).reports:
        found = report["shared"]["twice"]
        assert found["late"] == [2]
        for gradient, expected in zip(found["shared"], found["whole"], strict=True):
            assert gradient == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.launcher
@pytest.mark.parametrize("backend", ["zero3", "fsdp2"])
def test_a_rank_without_a_gradient_gathers_in_the_same_order(world, backend: str) -> None:
    """Two steps of three blocks, gathered once each; the weights are those of ranks that keep all indices."""
    reports = world(2).reports
    logs = [report["shared"][backend]["log"] for report in reports]
    assert logs[0] == logs[1]
    assert [operation for operation, _ in logs[0]["indices"]] == ["_allgather_base_"] * 2 * 3
    assert reports[0]["withheld"][backend]["log"]["indices"] == []
    assert reports[0]["shared"][backend]["weights"] == reports[0]["withheld"][backend]["weights"]


def test_only_much_is_shared_out_and_not_on_a_cpu() -> None:
    assert worth_sharing(BLOCK_BYTES, "cuda")
    assert not worth_sharing(BLOCK_BYTES - 1, "cuda")
    assert not worth_sharing(2**40, "cpu")
