"""What a user sees when something goes wrong: one line, once, however many ranks there are."""

from __future__ import annotations

import sys
import time

from trace_dist.utils.launch import launched_rank

GRACE_SECONDS = 10
"""How long other ranks than 0 wait before they speak up: a launcher ends them sooner where rank 0 has the same error."""


def explain_system(error: OSError) -> str:
    """What the system refused, with a cure."""
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{error.strerror or error}; check paths, permissions and free space, and start the command again"


def report_error(message: object) -> None:
    """Print ``error: <message>`` on standard error, as one line."""
    rank = launched_rank()
    if rank:
        time.sleep(GRACE_SECONDS)
    where = f" [rank {rank}]" if rank else ""
    print(f"error{where}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
