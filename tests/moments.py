"""Moments in the life of a run: when a file or folder takes its place, or goes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def watch(folder: Path, happened: Callable[[str], object]) -> None:
    """Call ``happened("replace|rename|remove PATH")`` after each such event in this process, PATH as seen from ``folder``."""
    replace, rename, remove = Path.replace, Path.rename, shutil.rmtree

    def place(path: Path) -> str:
        return Path(path).relative_to(folder).as_posix() if folder in Path(path).parents else "elsewhere"

    def replaced(self: Path, target: Path) -> Path:
        new = replace(self, target)
        happened(f"replace {place(target)}")
        return new

    def renamed(self: Path, target: Path) -> Path:
        new = rename(self, target)
        happened(f"rename {place(target)}")
        return new

    def removed(path: Path, *args: Any, **options: Any) -> None:
        remove(path, *args, **options)
        happened(f"remove {place(path)}")

    Path.replace, Path.rename, shutil.rmtree = replaced, renamed, removed  # type: ignore[assignment, method-assign]
