"""What this process is in: told by its work as it goes, and seen from another thread when the work itself cannot speak."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

PACKAGE = str(Path(__file__).parents[1])
_COLLECTIVES = "distributed_c10d.py"
_WAITS = frozenset({"wait", "barrier", "synchronize", "all_gather"})
"""Functions of these folders wait in C++, where no frame is seen; the standard library's wait for threads of this process."""
_WAITING_FOLDERS = (PACKAGE, "/torch/distributed/", "/deepspeed/")
_NOT_A_PLACE = tuple(
    f"{PACKAGE}/utils/{name}.py" for name in ("dist", "together", "agreement", "log", "heartbeat")
)
"""Files that say nothing of what the work is."""


@dataclass
class _Told:
    """What the work says of itself."""

    command: str = ""
    part: str = ""
    step: int = 0
    steps: int | None = None


_TOLD = _Told()


def begin(command: str) -> None:
    """A command begins."""
    _TOLD.command, _TOLD.part = command, ""


def note(part: str, step: int, steps: int | None) -> None:
    """A part of it is at a step, counted from 1; cheap enough for every step."""
    _TOLD.part, _TOLD.step, _TOLD.steps = part, step, steps


@dataclass(frozen=True)
class Activity:
    """What a process is in.

    Attributes:
        work: command, part and step, as far as they were told.
        place: file and line of this package, or of what it called; empty when none is known.
        collective: what it waits in for other ranks; None when it works.
        still: seconds for which it has been at the very same place.
    """

    work: str = ""
    place: str = ""
    collective: str | None = None
    still: float = 0.0

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Activity:
        """What ``asdict`` gave, after a way through JSON."""
        collective = found.get("collective")
        return cls(
            str(found.get("work", "")),
            str(found.get("place", "")),
            None if collective is None else str(collective),
            float(found.get("still", 0.0)),
        )

    def __str__(self) -> str:
        parts = [part for part in (self.work, self.collective) if part]
        place = f" ({self.place})" if self.place else ""
        return (", ".join(parts) or "its own work") + place


class Watcher:
    """Looks at the main thread now and then."""

    def __init__(self) -> None:
        self._stack: tuple[tuple[CodeType, int], ...] = ()
        self._since = time.monotonic()

    def look(self) -> Activity:
        """What the main thread is in."""
        frames = _frames(sys._current_frames().get(threading.main_thread().ident or 0))
        stack = tuple((frame.f_code, frame.f_lasti) for frame in frames)
        now = time.monotonic()
        if stack != self._stack:
            self._stack, self._since = stack, now
        return Activity(_work(), _place(frames), _collective(frames), now - self._since)


def _work() -> str:
    told = _TOLD
    total = "" if told.steps is None else f" of {told.steps}"
    part = f"{told.part} step {told.step}{total}" if told.part else ""
    return ": ".join(filter(None, (told.command, part)))


def _frames(frame: FrameType | None) -> list[FrameType]:
    """The stack, innermost first."""
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def _place(frames: list[FrameType]) -> str:
    """The innermost line of this package that says what the work is."""
    for frame in frames:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE) and not name.startswith(_NOT_A_PLACE):
            return f"trace_dist{name.removeprefix(PACKAGE)}:{frame.f_lineno}"
    others = (
        frame for frame in frames if not any(part in frame.f_code.co_filename for part in _WAITING_FOLDERS)
    )
    return next((f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" for frame in others), "")


def _collective(frames: list[FrameType]) -> str | None:
    """The collective that the stack is in: torch's, as it was called, or something that waits for one."""
    called = [frame.f_code.co_name for frame in frames if frame.f_code.co_filename.endswith(_COLLECTIVES)]
    if called:
        return called[-1]
    if not frames or frames[0].f_code.co_name not in _WAITS:
        return None
    inside = any(folder in frames[0].f_code.co_filename for folder in _WAITING_FOLDERS)
    return frames[0].f_code.co_name if inside else None
