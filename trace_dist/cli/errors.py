"""What a user sees when something goes wrong: one line, once, however many ranks there are."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress

from trace_dist.utils.launch import launched_rank

GRACE_SECONDS = 10
"""How long other ranks than 0 wait before they speak up: a launcher ends them sooner where rank 0 has the same error."""


def explain_system(error: OSError) -> str:
    """What the system refused, with a cure."""
    if error.filename is None and not _has_folder():
        return "the folder that this command was started in is gone; change into one that is there, and start the command again"
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{error.strerror or error}; check paths, permissions and free space, and start the command again"


def _has_folder() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def report_error(message: object) -> None:
    """Print ``error: <message>`` on standard error, as one line, unless that is a file on a full disk."""
    rank = launched_rank()
    if rank:
        time.sleep(GRACE_SECONDS)
    where = f" [rank {rank}]" if rank else ""
    with suppress(OSError):
        print(f"error{where}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
