"""When checkpoints are due, on a clock of the test's own."""

from __future__ import annotations

import pytest

from trace_dist.train.cadence import Cadence


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(("every", "due"), [(3, [3, 6, 9]), (1, list(range(1, 10))), (0, [])])
def test_by_steps(every: int, due: list[int]) -> None:
    clock = Clock()
    cadence = Cadence(every, 3.0, clock)
    clock.wait(1e6)
    assert [step for step in range(1, 10) if cadence.due(step)] == due


def test_by_time_every_few_minutes() -> None:
    clock = Clock()
    cadence = Cadence(None, 3.0, clock)
    kept = []
    for step in range(1, 601):
        clock.wait(1.0)
        if cadence.due(step):
            cadence.measure(lambda: clock.wait(2.0))
            kept.append(step)
    assert kept == [180, 360, 540]


def test_a_slow_disk_takes_a_twentieth_of_the_time_at_most() -> None:
    clock = Clock()
    cadence = Cadence(None, 1.0, clock)
    spent, begin = 0.0, clock.now
    for step in range(1, 20_000):
        clock.wait(1.0)
        if cadence.due(step):
            cadence.measure(lambda: clock.wait(40.0))
            spent += 40.0
    assert spent > 40.0
    # The first one's cost is not known before it is written.
    assert spent - 40.0 <= 0.05 * (clock.now - begin)
