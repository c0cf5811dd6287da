"""Ends processes with all that they have started."""

from __future__ import annotations

import time
from contextlib import suppress

import psutil

PATIENCE_SECONDS = 5.0


def end_tree(pid: int, patience: float = PATIENCE_SECONDS) -> None:
    """End a process and all below it: asked first, then killed. Launchers do not pass signals on, so each is asked."""
    try:
        root = psutil.Process(pid)
        tree = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return
    for process in tree:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    deadline = time.monotonic() + patience
    while (alive := [process for process in tree if _lives(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    # One that is stopped, or waits in a system call, hears nothing else.
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _lives(process: psutil.Process) -> bool:
    """Whether a process still runs; its parent may not have looked after it yet."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
