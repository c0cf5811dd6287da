"""Where results are kept that the same inputs give again: beside the cache of ``datasets``, named by a digest of the inputs."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets

_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""What the system says of a place that cannot be written."""


@contextmanager
def caching() -> Iterator[None]:
    """Where something may be written into the cache.

    Raises:
        ValueError: the cache cannot be written: no room, no permission, a disk that is only read.
    """
    try:
        yield
    except OSError as error:
        folder = Path(datasets.config.HF_DATASETS_CACHE).absolute()
        place = folder if error.filename is None else Path(os.fsdecode(error.filename)).absolute()
        if error.errno not in _REFUSED or not (place.is_relative_to(folder) or folder.is_relative_to(place)):
            raise
        raise ValueError(
            f"HF_DATASETS_CACHE={str(folder)!r}: the cache of data cannot be written ({error.strerror}); make room there, or set "
            "HF_DATASETS_CACHE to a folder that can be written"
        ) from error


def cached(digest: str, suffix: str) -> Path:
    """The file of a digest; its folder is there.

    Args:
        digest: hexadecimal, of all that the result depends on.
        suffix: of the file, with its dot.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "trace_dist"
    with caching():
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
