"""What a run shows of its stages: a bar for each that is at work, then one line with what came of it; each warning once."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from trace_dist.report.tables import duration
from trace_dist.utils.events import Event
from trace_dist.utils.log import SECONDS_BETWEEN_LINES, console, get_logger

logger = get_logger(__name__)
OUTCOME_WIDTH = 56
"""Characters of a line that are kept for what came of a stage, so that the times stand below each other."""


class Display:
    """Standard error while stages are at work: bars in a terminal, a line now and then elsewhere.

    Args:
        names: of all stages that will be shown.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._width = max(map(len, names), default=0)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        # It leaves nothing behind: the lines of finished stages stand above.
        self._bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._rows = dict[str, TaskID]()
        self._lines = dict[str, float]()
        self._outcomes = dict[str, list[str]]()
        self._warnings = set[str]()

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._bars.stop()

    def begin(self, name: str) -> None:
        """A stage has been started."""
        self._rows[name] = self._bars.add_task(f"{name:<{self._width}}", total=None)
        self._lines[name] = time.monotonic()
        self._outcomes[name] = []

    def show(self, name: str, events: Iterable[Event]) -> None:
        """What a stage has told."""
        for event in events:
            if event["kind"] == "progress":
                self._progress(name, event)
            elif event["kind"] == "outcome":
                self._outcomes[name].append(event["text"])
            elif event["text"] not in self._warnings:
                self._warnings.add(event["text"])
                logger.warning("%s: %s", name, event["text"])

    def end(self, name: str, seconds: float) -> None:
        """A stage is done."""
        self.drop(name)
        self.line(name, "; ".join(self._outcomes[name]) or "done", duration(seconds))

    def drop(self, name: str) -> None:
        """A stage has ended, or was stopped: its bar goes."""
        self._bars.remove_task(self._rows.pop(name))

    def line(self, name: str, text: str, last: str = "") -> None:
        """One line that stays."""
        self._print(f"{name:<{self._width}}  {text:<{OUTCOME_WIDTH}}  {last:>10}".rstrip())

    def _progress(self, name: str, event: Event) -> None:
        text, done, total = event["text"], event["done"], event["total"]
        self._bars.update(
            self._rows[name], description=f"{name:<{self._width}}  {text}", completed=done, total=total
        )
        if not console.is_terminal and time.monotonic() - self._lines[name] >= SECONDS_BETWEEN_LINES:
            self._lines[name] = time.monotonic()
            self._print(f"{name:<{self._width}}  {text}: {done}" + ("" if total is None else f" of {total}"))

    def _print(self, line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
