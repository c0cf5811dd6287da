"""How many files a rank may have open.

Every group of all ranks over gloo joins each rank with each other one by a connection of its own, which is an open file, and so
does what watches over them. The usual soft limit, 1,024, is met near 250 ranks.
"""

from __future__ import annotations

import resource
import socket
from contextlib import suppress

PER_RANK = 5
"""Connections of a rank to each other one: the default group, three beside it, and signs of life."""
OWN = 256
"""Other files: libraries, weights, data, logs."""


def allow_connections(num_ranks: int) -> None:
    """Let this process open as many files as it may.

    Raises:
        ValueError: these are too few for so many ranks.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # Where a limit of the whole system is lower, the soft one stays.
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    needed = PER_RANK * num_ranks + OWN
    if soft != resource.RLIM_INFINITY and soft < needed:
        raise ValueError(
            f"RLIMIT_NOFILE={soft}: among {num_ranks} ranks each opens up to {needed} connections and files; raise the hard "
            f"limit on {socket.gethostname()} (`ulimit -Hn`, or nofile in /etc/security/limits.conf) to {needed}"
        )
