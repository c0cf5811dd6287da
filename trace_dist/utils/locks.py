"""Files that one process holds at a time; the kernel lets go of them whatever happens to it."""

from __future__ import annotations

import atexit
import fcntl
import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from trace_dist.utils.files import writing
from trace_dist.utils.launch import process_name
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)
_UNTIL_EXIT = ExitStack()
atexit.register(_UNTIL_EXIT.close)


class Held(ValueError):
    """Another process holds the lock.

    Attributes:
        holder: who, as ``process_name`` says it.
    """

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


@contextmanager
def hold(path: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock file while the block runs; it is gone afterwards, and so is a folder that was made for it and is empty.

    Args:
        path: the file; folders on the way to it are made.
        what: begins messages: a path, or ``field=value``.
        wait: for another holder to let go, instead of giving up.

    Raises:
        Held: another process, or another part of this one, holds it.
        ValueError: nothing can be written there.
    """
    with ExitStack() as stack:
        with writing(what):
            made = not path.parent.exists()
            handle = stack.enter_context(_take(path, what, wait))
            # Also where a full disk does not take the holder's name.
            stack.callback(_remove, path, made)
            handle.truncate(0)
            name = process_name(os.getpid()).encode()
            while name:
                name = name[handle.write(name) :]
        yield


@contextmanager
def hold_or_share(path: Path, what: str, sharers: Collection[str] = ()) -> Iterator[None]:
    """Hold a lock file while the block runs, or work beside the one that holds it.

    Args:
        path: the file.
        what: begins messages.
        sharers: holders, as ``process_name`` says it, beside which this process may work; it is one itself.

    Raises:
        Held: another process holds it.
        ValueError: nothing can be written there.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(hold(path, what))
        except Held as held:
            if held.holder not in (process_name(os.getpid()), *sharers):
                raise
        yield


def hold_until_exit(path: Path, what: str, sharers: Collection[str] = ()) -> None:
    """Hold a lock file until this process ends or calls ``release``.

    Args:
        path: the file.
        what: begins messages: ``field=value``.
        sharers: as ``hold_or_share``.

    Raises:
        ValueError: another process holds it, or nothing can be written there.
    """
    try:
        _UNTIL_EXIT.enter_context(hold_or_share(path, what, sharers))
    except Held as held:
        field = what.partition("=")[0]
        raise ValueError(
            f"{what}: {held.holder} is at work in it; wait for it, end it, or choose another {field}"
        ) from None


def release() -> None:
    """Let go of what ``hold_until_exit`` took."""
    _UNTIL_EXIT.close()


def _remove(path: Path, made: bool) -> None:
    """Delete a lock file, and its folder where that was made for it and is empty; one that stays is held by nobody."""
    with suppress(OSError):
        path.unlink(missing_ok=True)
        if made:
            path.parent.rmdir()


def _take(path: Path, what: str, wait: bool) -> BinaryIO:
    """The locked file at ``path``. One that its holder removed before it let go is no longer there, so a new one is opened."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = _opened(path)
        except FileNotFoundError:  # a holder that was refused has just taken its empty folder away
            continue
        try:
            _lock(handle, what, wait)
            at_path = _is_at(handle, path)
            if at_path and handle.writable():
                return handle
            if at_path:
                path.unlink()
        except BaseException:
            handle.close()
            raise
        handle.close()


def _opened(path: Path) -> BinaryIO:
    """A lock file, to write; to read where it is another user's: that is enough to see whether they are at work."""
    try:
        return path.open("a+b", buffering=0)
    except PermissionError:
        if not path.exists():
            raise
    try:
        return path.open("rb", buffering=0)
    except PermissionError:
        raise ValueError(
            f"{path}: the lock file is another user's and cannot be read; wait for them, or delete it where they are not at work"
        ) from None


def _is_at(handle: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(handle: BinaryIO, what: str, wait: bool) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        holder = handle.read().decode(errors="replace") or "another process"
        if not wait:
            raise Held(holder) from None
        logger.info("%s: %s is at work on it; waiting", what, holder)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:  # some network file systems
        logger.warning(
            "%s: cannot be locked (%s); start nothing else that writes there", what, error.strerror
        )
