"""A disk that takes no more, for the tests of what is then left."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

FITS = 500
"""Bytes that a file may have."""


@contextmanager
def full_disk(fits: int = FITS) -> Iterator[None]:
    """Any file that grows beyond a few bytes fails, as on a disk without room; the system says so, nothing is pretended."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (fits, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
