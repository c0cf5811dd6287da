"""Paths that begin with ``~``, as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def from_home(path: str | Path) -> Path:
    """A path, its ``~`` or ``~user`` replaced by that home; a name that begins with ``~`` and is no user's stays as it is.

    Raises:
        ValueError: this user has no home.
    """
    written = str(path)
    expanded = os.path.expanduser(written)
    if expanded == "~" or expanded.startswith("~/"):
        raise ValueError(
            f"{written!r}: ~ stands for the user's home, and this user has none (no HOME, and no entry of the system's); set "
            "HOME, or write the path in full"
        )
    return Path(expanded)
