"""Where results are kept that the same inputs give again: beside the cache of ``datasets``, named by a digest of the inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import datasets


def cached(digest: str, suffix: str) -> Path:
    """The file of a digest; its folder is there.

    Args:
        digest: hexadecimal, of all that the result depends on.
        suffix: of the file, with its dot.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "trace_dist"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{digest}{suffix}"


def place_of(files: Iterable[Path]) -> str:
    """The folder for what ``datasets`` makes of some files, as they are now.

    ``datasets`` itself takes a file of the same name and time for the same file. One that ``cp -p``, ``rsync`` or
    ``tar`` put there has the time that it had elsewhere; when it came (``st_ctime``) no such tool can say.
    """
    digest = hashlib.sha256()
    for file in files:
        now = file.stat()
        digest.update(f"{file.resolve()}\0{now.st_size} {now.st_mtime_ns} {now.st_ctime_ns}\n".encode())
    return str(cached(digest.hexdigest()[:32], ""))
