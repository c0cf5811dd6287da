"""One run per folder, and no process of a run outlives it, however it ended."""

from __future__ import annotations

import fcntl
import logging
import os
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trace_dist.launching import RUN_PID
from trace_dist.run_folder import RunFolder
from trace_dist.utils.files import writing

logger = logging.getLogger(__name__)


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold a run folder while the block runs; the kernel lets go of it whatever happens to this process.

    Raises:
        ValueError: another process holds it, or nothing can be written there.
    """
    with writing(f"run_dir={str(folder)!r}"):
        folder.mkdir(parents=True, exist_ok=True)
        handle = RunFolder(folder).lock.open("a+", encoding="utf-8")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            raise ValueError(
                f"run_dir={str(folder)!r}: {handle.read() or 'another run'} is at work in it; "
                "wait for it, end it, or choose another run_dir"
            ) from None
        except OSError as error:  # some network file systems
            logger.warning(
                "run_dir %s: cannot be locked (%s); start no second run in it", folder, error.strerror
            )
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        yield


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
