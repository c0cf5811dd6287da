"""One process at a time: a lock file that the kernel lets go of, however its holder ends."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trace_dist.utils.files import writing
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)


@contextmanager
def held(path: Path, what: str, cure: str) -> Iterator[None]:
    """Hold a lock file while the block runs. It says who holds it, and is empty afterwards; it is never deleted.

    Args:
        path: the lock file; its folder is made.
        what: begins the messages.
        cure: what to do when another process holds it.

    Raises:
        ValueError: another process (or another thread) holds it, or nothing can be written there.
    """
    with writing(what):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a+", encoding="utf-8")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            raise ValueError(
                f"{what}: {handle.read() or 'another process'} is at work in it; {cure}"
            ) from None
        except OSError as error:
            # some network file systems
            logger.warning("%s: cannot be locked (%s); let no second process write", what, error.strerror)
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        try:
            yield
        finally:
            handle.truncate(0)
