"""The lock of an operator that DeepSpeed compiles on its first use.

torch's builder waits for as long as a file ``lock`` lies in the operator's folder, without a word. A compilation that was killed
leaves it there, and every later job of the user hangs. A lock is left over where nothing in its folder has changed for
``STALE_SECONDS`` and no process of this machine works there (ninja and the compilers do).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from trace_dist.utils.log import get_logger

logger = get_logger(__name__)

STALE_SECONDS = 300.0
"""Longer than one source file takes to compile, here or on another machine that shares the folder."""
OPERATOR = "deepspeed_shm_comm"
"""What DeepSpeed compiles where it computes on CPUs."""


def folder_of_operators() -> Path:
    """Where torch builds extensions, and DeepSpeed its operators."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def wait_for_compilations(folder: Path | None = None, poll_seconds: float = 0.5) -> None:
    """Wait for the compilations that are under way, say so, and take away the locks that are left over.

    Args:
        folder: where to look; ``folder_of_operators`` when None.
        poll_seconds: how often.
    """
    folder = folder_of_operators() if folder is None else folder
    for lock in sorted([*folder.glob("*/lock"), *folder.glob("*/*/lock")]):
        told = False
        while lock.exists():
            if _is_left_over(lock):
                logger.warning("%s: left by a compilation that was killed; it is taken away", lock)
                lock.unlink(missing_ok=True)
                break
            if not told:
                logger.info("%s: an operator is being compiled by another process; waiting for it", lock)
                told = True
            time.sleep(poll_seconds)


def say_first_use(folder: Path | None = None) -> None:
    """Say that the operator will be compiled, where it is not there yet: that takes minutes without a word from DeepSpeed."""
    folder = folder_of_operators() if folder is None else folder
    built = f"{OPERATOR}/{OPERATOR}.so"  # right there where TORCH_EXTENSIONS_DIR names the folder
    if not any([*folder.glob(built), *folder.glob(f"*/{built}")]):
        logger.info("DeepSpeed compiles an operator on its first use on this machine: one to three minutes")


def _is_left_over(lock: Path) -> bool:
    try:
        newest = max(path.stat().st_mtime for path in lock.parent.iterdir())
    except (FileNotFoundError, ValueError):  # it went meanwhile
        return False
    return time.time() - newest > STALE_SECONDS and not _is_worked_in(lock.parent)


def _is_worked_in(folder: Path) -> bool:
    """Whether a process of this machine has the folder as its working directory."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == folder.resolve():
                return True
        except OSError:  # it has ended, or is another user's
            continue
    return False
