"""Logging and progress from rank 0 alone."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import track

from trace_dist.utils import dist

T = TypeVar("T")
console = Console(stderr=True)


class _RankZero(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return dist.is_main() or record.levelno >= logging.ERROR


def setup_logging() -> None:
    """Send the package's log records to standard error; other ranks than 0 report errors only."""
    handler = RichHandler(console=console, show_path=False, log_time_format="%H:%M:%S")
    handler.addFilter(_RankZero())
    logger = logging.getLogger("trace_dist")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def get_logger(name: str) -> logging.Logger:
    """The logger of a module."""
    return logging.getLogger(name)


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar on rank 0 of an interactive terminal; silently elsewhere."""
    show = dist.is_main() and console.is_terminal
    yield from track(items, description, total=total, console=console, disable=not show, transient=True)
