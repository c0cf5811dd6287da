"""Each fault happens once in a job: what has happened leaves a file in a folder that all ranks and all starts share."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from faults.grammar import Fault


@dataclass(frozen=True)
class Happened:
    """What has happened in a job.

    Attributes:
        folder: where it is noted.
    """

    folder: Path

    def first(self, number: int, fault: Fault, step: int) -> bool:
        """Whether the fault of this number has not happened yet; from now on it has."""
        try:
            handle = os.open(self.folder / f"fault-{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            json.dump({"fault": fault.text, "step": step, "time": time.monotonic(), "pid": os.getpid()}, file)
            file.flush()
            os.fsync(handle)
        return True

    def notes(self) -> list[dict[str, object]]:
        """What has happened so far, in order; ``time`` is that of ``time.monotonic`` on this machine."""
        return [json.loads(path.read_text() or "{}") for path in sorted(self.folder.glob("fault-*"))]
