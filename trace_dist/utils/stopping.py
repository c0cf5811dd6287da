"""A command that is asked to stop: it ends after its present step, with a checkpoint, and goes on when it is started again.

SIGUSR1 asks: Slurm sends it before a job's time is up. A run asks its stages by a file, since launchers do not pass signals on.
Under Slurm SIGTERM asks too, as that is how it takes nodes back; everywhere else it ends a process at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from trace_dist.utils.codes import LOST

STOP = "TRACE_DIST_STOP"
"""Environment variable of what a run starts: the file whose presence asks it to stop."""
GRACE_SECONDS = 60.0
"""How long a step and a checkpoint may take; then the process ends without one."""
_ASKED = threading.Event()
_TELLERS: list[Callable[[], None]] = []


class Stopped(Exception):
    """A command has stopped because it was asked to."""


def signals() -> list[signal.Signals]:
    """What asks a process to stop here."""
    return [signal.SIGUSR1, *([signal.SIGTERM] if "SLURM_JOB_ID" in os.environ else [])]


def listen_for_signals() -> None:
    """From now on these ask this process to stop."""
    for number in signals():
        signal.signal(number, _on_signal)


def tell(teller: Callable[[], None] | None) -> None:
    """What lets the other ranks know that this one was asked; None where there are no others any more."""
    _TELLERS[:] = [] if teller is None else [teller]


def hear() -> None:
    """Another rank was asked."""
    _ASKED.set()


def asked() -> bool:
    """Whether this job was asked to stop; rank 0 knows it of all ranks."""
    path = os.environ.get(STOP)
    return _ASKED.is_set() or (path is not None and Path(path).exists())


def _on_signal(number: int, _: object) -> None:
    if _ASKED.is_set():
        return
    _ASKED.set()
    for teller in _TELLERS:
        teller()
    # A rank that hangs in a collective never comes to the end of its step.
    timer = threading.Timer(GRACE_SECONDS, os._exit, (LOST,))
    timer.daemon = True
    timer.start()
