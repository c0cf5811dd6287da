"""Each fault happens once in a job: what has happened leaves a file in a folder that all ranks and all starts share."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.grammar import Fault


@dataclass(frozen=True)
class Happened:
    """What has happened in a job.

    Attributes:
        folder: where it is noted.
    """

    folder: Path

    def first(self, number: object, fault: Fault, step: int) -> bool:
        """Whether the fault of this number, or name, has not happened yet; from now on it has."""
        try:
            handle = os.open(self.folder / f"fault-{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            json.dump({"fault": fault.text, "step": step, "time": time.monotonic(), "pid": os.getpid()}, file)
            file.flush()
            os.fsync(handle)
        return True

    def notes(self) -> list[dict[str, Any]]:
        """What has happened so far, in order; ``time`` is that of ``time.monotonic`` on this machine."""
        texts = (path.read_text() for path in self.folder.glob("fault-*"))
        return sorted((json.loads(text) for text in texts if text), key=lambda note: note["time"])
