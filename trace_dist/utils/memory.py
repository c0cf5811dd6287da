"""Memory of the host that a process may still take: what is free, and what the limits of its control groups leave."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

UNLIMITED = 2**60
"""A limit from which on there is none: version 1 writes a number of about 2^63."""


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes that may be taken before the host is full, or the system ends a process of a limited container.

    Args:
        root: where ``proc`` and ``sys`` lie.
    """
    return min(int(psutil.virtual_memory().available), *(_rooms(root) or [UNLIMITED]))


def _rooms(root: Path) -> list[int]:
    """What each limit above this process leaves; pages of files, which the system gives back, are free."""
    rooms = []
    for folder in _folders(root):
        for limit, used, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            # No such file, or the word max.
            with suppress(OSError, ValueError):
                most = int((folder / limit).read_text())
                if most < UNLIMITED:
                    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    taken = int((folder / used).read_text()) - int(stat.get(cached, 0))
                    rooms.append(max(0, most - taken))
    return rooms


def _folders(root: Path) -> Iterator[Path]:
    """The control groups of this process that limit memory, of either version, up to the topmost. Inside a container the paths
    may be those of the host, of which the topmost alone is seen."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
            place = top / path.strip("/")
            yield from (each for each in (place, *place.parents) if each == top or top in each.parents)
