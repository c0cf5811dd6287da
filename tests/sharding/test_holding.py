"""Weights that are held whole for many forward passes (sharding/holding.py)."""

from __future__ import annotations

import gc
import weakref

import pytest
from torch import nn

from trace_dist.utils import held

pytestmark = pytest.mark.launcher
BACKENDS = ("zero3", "fsdp2")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_asks_held_weights_alone(world, backend: str) -> None:
    """Rank 0 runs one forward pass more than rank 1; a collective in it would wait for ever."""
    found = world(2).section("holding")[backend]
    assert [look["alone"] for look in found["held"]["looks"]] == [True] * 4
    assert [look["alone"] for look in found["gathered"]["looks"]] == [False] * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_held_weights_answer_and_train_as_gathered_ones(world, backend: str) -> None:
    """Bit for bit, between training steps, and after weights have changed inside the block."""
    found = world(2).section("holding")[backend]
    assert found["held"]["losses"] == found["gathered"]["losses"]
    for ours, theirs in zip(found["held"]["looks"], found["gathered"]["looks"], strict=True):
        assert (ours["sum"], ours["changed"]) == (theirs["sum"], theirs["changed"])
        assert ours["same"]
        assert theirs["same"]
        assert ours["changed"] != ours["sum"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_more_stays_gathered_afterwards(world, backend: str) -> None:
    for report in world(2).reports:
        found = report["holding"][backend]
        assert max(found["held"]["left"]) <= max(found["gathered"]["left"])


def test_an_offer_keeps_neither_side_alive() -> None:
    class Backend:
        def __init__(self, module: nn.Module) -> None:
            self.module = module
            held.offer(module, self.hold)

        def hold(self) -> None: ...

    backend = Backend(nn.Linear(1, 1))
    dead = weakref.ref(backend.module)
    del backend
    gc.collect()
    assert dead() is None
