"""A process that dies, as by ``kill -9``, just before its n-th step on the disk."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

STEPS = ("replace", "rename", "link", "mkdir", "unlink", "rmdir", "fsync")
"""Functions of ``os`` that change what is on disk."""

DIED, FAILED = 9, 1


def dies_at(step: int, work: Callable[[], None]) -> bool:
    """Run ``work`` in a process of its own that dies before step number ``step``; whether it came to that."""
    child = os.fork()
    if child == 0:
        _run(step, work)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, DIED), "the work failed by itself"
    return status == DIED


def _run(step: int, work: Callable[[], None]) -> None:
    taken = 0

    def counted(name: str) -> Callable[..., Any]:
        whole = getattr(os, name)

        def take(*args: Any, **options: Any) -> Any:
            nonlocal taken
            if taken == step:
                # nothing is cleaned up, as no `finally` runs
                os._exit(DIED)
            taken += 1
            return whole(*args, **options)

        return take

    for name in STEPS:
        setattr(os, name, counted(name))
    try:
        work()
    except BaseException:
        traceback.print_exc(file=sys.stderr)
        os._exit(FAILED)
    os._exit(0)
