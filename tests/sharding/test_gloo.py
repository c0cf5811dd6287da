"""The all-gather over gloo has the bits of torch's and takes its place under ZeRO-3 and FSDP2."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.launcher


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_gathers_what_torch_does_however_many_are_under_way(world, num_ranks: int) -> None:
    for report in world(num_ranks).reports:
        found = report["gathering_over_gloo"]
        assert found["under way"] == found["own place"] == found.get("group", 0) == 0


def test_an_output_of_another_size_or_dtype_is_refused(world) -> None:
    found = world(2).section("gathering_over_gloo")
    assert "4 elements of torch.float32; 2 shards of 3 elements" in found["size"]
    assert "of torch.float64 need 6 of that dtype" in found["dtype"]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_both_backends_gather_weights_by_messages(world, num_ranks: int) -> None:
    for report in world(num_ranks).reports:
        for collectives in report["gathering_over_gloo"]["steps"]:
            assert {"send", "recv_"} <= set(collectives)
            assert not [name for name in collectives if "allgather" in name]
