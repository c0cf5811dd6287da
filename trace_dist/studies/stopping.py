"""How a study is asked to end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):
    """The study was asked to end."""


@contextmanager
def stopping() -> Iterator[None]:
    """SIGTERM and SIGINT end the work as ``Stopped``: what it was at is lost, and what was done is summed up."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
