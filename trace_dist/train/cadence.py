"""When a checkpoint is due: every so many steps, or by time, so that little work is lost and little time is spent."""

from __future__ import annotations

import time
from collections.abc import Callable

SHARE = 0.05
"""Largest part of the time that checkpoints by time may take."""


class Cadence:
    """Says when the next checkpoint is due.

    By time, the first comes after ``minutes``. Each later one waits as long again, and longer where the last one took so much
    time that checkpoints would take more than ``SHARE`` of it.

    Args:
        every: steps between checkpoints; None goes by time, 0 is never.
        minutes: work between checkpoints by time.
        clock: seconds since some moment.
    """

    def __init__(
        self, every: int | None, minutes: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._every, self._seconds, self._clock = every, 60 * minutes, clock
        self._cost = 0.0
        self._since = clock()

    def due(self, step: int) -> bool:
        """Whether a checkpoint should follow this step."""
        if self._every is not None:
            return self._every > 0 and step % self._every == 0
        return self._clock() - self._since >= max(self._seconds, self._cost * (1 - SHARE) / SHARE)

    def measure(self, write: Callable[[], object]) -> None:
        """Write a checkpoint; the wait for the next one begins when it is done."""
        begin = self._clock()
        write()
        self._since = self._clock()
        self._cost = self._since - begin
