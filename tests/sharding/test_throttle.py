"""The host does not run away from the accelerator (sharding/throttle.py)."""

from __future__ import annotations

import torch
from torch import nn

from trace_dist.sharding.throttle import AHEAD, Throttle

NUM_BLOCKS = 5


def test_before_each_block_the_host_waits_for_the_one_two_before_it() -> None:
    log: list[tuple[str, int]] = []
    numbers = iter(range(100))

    class Event:
        def __init__(self) -> None:
            self.number = next(numbers)

        def record(self) -> None:
            log.append(("begins", self.number))

        def synchronize(self) -> None:
            log.append(("waited for", self.number))

    blocks = nn.Sequential(*(nn.Linear(3, 3) for _ in range(NUM_BLOCKS)))
    Throttle(blocks, Event)
    blocks(torch.ones(2, 3)).sum().backward()
    with torch.no_grad():
        blocks(torch.ones(2, 3))
    expected = []
    for number in range(3 * NUM_BLOCKS):  # forward, backward, and forward without gradients
        expected.append(("begins", number))
        expected += [("waited for", number - AHEAD)] * (number >= AHEAD)
    assert log == expected
