"""Logging and progress from rank 0 alone: colours and bars in a terminal, plain lines in files and pipes."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import track

from trace_dist.utils import activity, dist
from trace_dist.utils.events import listened, tell

T = TypeVar("T")
console = Console(stderr=True)
SECONDS_BETWEEN_EVENTS = 0.5
SECONDS_BETWEEN_LINES = 30.0
"""How often progress is reported: to the run that listens, and as a line where there is no terminal."""


class _RankZero(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return dist.is_main() or record.levelno >= logging.ERROR


class _WarnOnce(logging.Filter):
    """Lets each warning through once, and tells the run of it."""

    def __init__(self) -> None:
        super().__init__()
        self._seen = set[str]()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if record.levelno != logging.WARNING:
            return True
        if text in self._seen:
            return False
        self._seen.add(text)
        tell("warning", text=text)
        return True


def setup_logging() -> None:
    """Send the package's log records to standard error; other ranks than 0 report errors only."""
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, log_time_format="%H:%M:%S")
    else:
        # Not wrapped, so that a message can be searched for.
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    handler.addFilter(_RankZero())
    handler.addFilter(_WarnOnce())
    logger = logging.getLogger("trace_dist")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def get_logger(name: str) -> logging.Logger:
    """The logger of a module."""
    return logging.getLogger(name)


def outcome(text: str) -> None:
    """Say in a few words what came of a command; a run shows it in the line of its stage."""
    get_logger(__name__).info(text)
    tell("outcome", text=text)


def progress(items: Iterable[T], description: str, total: int | None = None, begun: int = 0) -> Iterator[T]:
    """Iterate, and show on rank 0 how far it is: to the run that listens, as a bar in a terminal, else as a line now and then.

    Every rank knows how far it is, for the others to see where it is lost. ``begun`` of the ``total`` were done before.
    """
    for done, item in enumerate(_shown(items, description, total, begun), begun):
        activity.note(description, done + 1, total)
        yield item


def _shown(items: Iterable[T], description: str, total: int | None, begun: int) -> Iterator[T]:
    if not dist.is_main() or total == 1:
        yield from items
    elif console.is_terminal and not listened():
        yield from track(items, description, total=total, completed=begun, console=console, transient=True)
    else:
        pause = SECONDS_BETWEEN_EVENTS if listened() else SECONDS_BETWEEN_LINES
        due = time.monotonic() + (0 if listened() else pause)
        for done, item in enumerate(items, begun):
            if time.monotonic() >= due:
                due = time.monotonic() + pause
                _report(description, done, total)
            yield item


def _report(description: str, done: int, total: int | None) -> None:
    if listened():
        tell("progress", text=description, done=done, total=total)
    else:
        get_logger(__name__).info("%s: %d%s", description, done, "" if total is None else f" of {total}")
