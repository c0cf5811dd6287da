"""Importing the large libraries: garbage collection waits, since modules are not garbage."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

MANY = 100
"""New modules from which on the collector is told of them."""


@contextmanager
def importing() -> Iterator[None]:
    """Around slow imports: no collection while they run, and later collections leave out what they made.

    torch and transformers make hundreds of thousands of objects that live as long as the process. The collector would walk
    through all of them again and again, a tenth of a command's start.
    """
    enabled, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) - before >= MANY:
            gc.freeze()
            # What triton's modules hold wants to be collected at the end; it complains otherwise.
            atexit.register(gc.unfreeze)
        if enabled:
            gc.enable()
