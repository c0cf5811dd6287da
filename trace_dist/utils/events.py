"""What a stage tells the run that started it: how far it is, what came of it, what it warns of.

The run names a file in an environment variable, which launchers pass on; rank 0 of the stage appends one JSON record a line, and
the run reads on from where it was.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_dist.utils import dist

EVENTS = "TRACE_DIST_EVENTS"
"""Environment variable of a run's stages: the file that their run reads."""
Event = dict[str, Any]
"""``kind`` is progress (``text``, ``done``, ``total``), outcome or warning (``text``)."""


def listened() -> bool:
    """Whether a run reads what this process tells."""
    return EVENTS in os.environ


def tell(kind: str, **facts: Any) -> None:
    """Tell the run, if one listens; rank 0 alone speaks. A file that cannot be written stops nobody's work."""
    if listened() and dist.is_main():
        with suppress(OSError), Path(os.environ[EVENTS]).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **facts}) + "\n")


@dataclass
class EventReader:
    """The run's end.

    Attributes:
        path: the file; the stage makes it.
        offset: bytes that were read.
    """

    path: Path
    offset: int = 0

    def news(self) -> list[Event]:
        """What was told since; a line that is being written waits, and one that a full disk has cut is left out."""
        if not self.path.is_file():
            return []
        with self.path.open("rb") as file:
            file.seek(self.offset)
            whole, end, _ = file.read().rpartition(b"\n")
        self.offset += len(whole) + len(end)
        return [event for line in whole.splitlines() if (event := _event(line)) is not None]


def _event(line: bytes) -> Event | None:
    with suppress(ValueError):
        event = json.loads(line)
        return event if isinstance(event, dict) and "kind" in event else None
    return None
