"""No process of a run outlives it, however it ended."""

from __future__ import annotations

import os
import select
import threading

RUN_PID = "TRACE_DIST_RUN_PID"
"""Environment variable of a run's stages, which their launchers pass on: the process that must live while they do."""


def end_with_run() -> None:
    """End this process as soon as the run that started it is gone, were it killed so hard that it could not stop its stages."""
    run = os.environ.get(RUN_PID)
    if run is None:
        return
    try:
        handle = os.pidfd_open(int(run))
    except ProcessLookupError:
        os._exit(1)

    def wait() -> None:
        select.select([handle], [], [])
        os._exit(
            1
        )  # from a thread, while the main thread may hang in a collective: nothing milder ends the process

    threading.Thread(target=wait, daemon=True).start()
