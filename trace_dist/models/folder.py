"""Checkpoint folders that are whole or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields an empty temporary folder beside ``path``; renames it to ``path`` when the block succeeds.

    Raises:
        ValueError: ``path`` exists already.
    """
    if path.exists():
        raise ValueError(f"{path}: exists already; delete it or choose another folder")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process that had the same id
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
