"""Files that rank 0 writes and the ranks of all hosts read, on a file system that the hosts share.

[Note: who looks] A client of NFS remembers for up to a minute that a file was not there, and so fails to open one that has come
since. So rank 0 alone looks whether a file is there, and its answer is everyone's (``together.on_main``). The others name the
file for the first time when it must be there, and wait for it (``present``).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from trace_dist.utils import dist

APPEARS_SECONDS = 90.0
"""How long a file may take to another host: longer than clients of NFS remember by default."""
POLL_SECONDS = 0.2


def present(path: Path, seconds: float = APPEARS_SECONDS) -> Path:
    """A file that rank 0 has found or written, once this rank sees it; rank 0 does not look.

    Raises:
        ValueError: this rank does not see it in time. Collective callers want ``together.on_all`` around it.
    """
    if not dist.is_main() and not comes(path.is_file, path, seconds):
        raise ValueError(
            f"{path}: {socket.gethostname()} does not see this file of rank 0's after {seconds:g} s; put it on a file system "
            "that all hosts share, at the same path"
        )
    return path


def check_shared(path: Path, what: str, seconds: float = 10.0) -> None:
    """Ranks on all hosts see what rank 0 has just written: masks, checkpoints and banks pass through such files. Collective.

    Args:
        path: a file of rank 0's.
        what: begins the message: ``field=value``.
        seconds: how long a file may take from host to host.

    Raises:
        ValueError: on every rank: some host does not see it.
    """
    if dist.world_size() == 1:
        return
    text = dist.broadcast_object(_text_of(path) if dist.is_main() else None)
    seen = comes(lambda: _text_of(path) == text, path, seconds)
    found = dist.gather_objects((socket.gethostname(), seen))
    blind = sorted({host for host, seen in found if not seen})
    if blind:
        raise ValueError(
            f"{what}: {', '.join(blind)} cannot see what rank 0 on {found[0][0]} writes there; put it on a file system that all "
            "hosts share, at the same path"
        )


def comes(is_there: Callable[[], bool], path: Path, seconds: float) -> bool:
    """Whether something is seen of a file within some seconds."""
    deadline = time.monotonic() + seconds
    while not is_there():
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_SECONDS)
        with suppress(OSError):
            os.listdir(path.parent)  # lets a client of NFS ask anew
    return True


def _text_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None
