"""A process that is killed at given moments and started again: ``lives.py FOLDER RUN METHOD MOMENT...``.

A moment is a regular expression. Every life but the last gets a real SIGKILL right after the first event that matches its moment:
``replace|rename|remove PATH`` in the run's folder, or ``batch NUMBER``, the number counting from 1 in each training. The
imports are done once; a life is a fork of the process that has done nothing else.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import peft  # noqa: F401  a life would import it anew
import torch.utils.tensorboard  # noqa: F401
from continual.small import make_config
from moments import watch

from trace_dist.continual.driver import run_continual
from trace_dist.data.batches import Batches
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)


def die_at(moment: str, folder: Path) -> None:
    """Make this process kill itself at a moment."""
    following = Batches.__next__

    def happened(event: str) -> None:
        if re.fullmatch(moment, event):
            os.kill(os.getpid(), signal.SIGKILL)

    def next_batch(self: Batches) -> Any:
        batch = following(self)
        happened(f"batch {self._consumed // self._batch_size}")
        return batch

    watch(folder, happened)
    Batches.__next__ = next_batch  # type: ignore[method-assign]


def live(folder: Path, run: str, method: str, moment: str | None) -> int:
    """One life; its wait status."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if moment is not None:
                die_at(moment, folder / run)
            run_continual(make_config(folder, [method], run))
            code = 0
        except Exception:
            logger.exception("a life ended with an error")
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def main() -> None:
    """Live until the last life ends by itself; exit 1 where a moment never came or an error did."""
    folder, run, method = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    gc.freeze()  # lives need not walk through the modules
    for moment in [*sys.argv[4:], None]:
        status = live(folder, run, method, moment)
        expected = signal.SIGKILL if moment is not None else 0
        if status != expected:
            sys.exit(f"moment {moment!r}: wait status {status}, expected {expected}")


if __name__ == "__main__":
    main()
