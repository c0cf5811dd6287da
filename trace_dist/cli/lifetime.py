"""No process of a run outlives it, however it ended."""

from __future__ import annotations

import os
import select
import threading

from trace_dist.launching import RUN_PID


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
        # From a thread, while the main thread may hang in a collective: nothing milder ends the process.
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
