"""Progress bars of ``datasets``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import datasets

from trace_dist.utils import dist
from trace_dist.utils.log import console


@contextmanager
def bars_on_main() -> Iterator[None]:
    """Shown where ours are: on rank 0 of an interactive terminal."""
    if datasets.are_progress_bars_disabled() or (dist.is_main() and console.is_terminal):
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
