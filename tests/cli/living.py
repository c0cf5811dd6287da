"""A rank that meets the others as a command does, and then lives; for test_lifetime.py: ``python -m living FOLDER BEHAVIOUR``."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from trace_dist.cli.lifetime import end_with_parents
from trace_dist.utils import activity, dist
from trace_dist.utils.heartbeat import Patience
from trace_dist.utils.shared_files import check_shared


def seen_by_rank_0() -> Path:
    path = Path("/dev/shm/trace_dist-test-lock")
    if dist.rank() == 0:
        path.write_text("of rank 0")
    return path


def work(folder: Path, behaviour: str) -> None:
    activity.begin("train")
    patience = Patience(silence_seconds=3, stuck_minutes=1, grace_seconds=0.5, failing_seconds=2)
    dist.init_distributed(dist.Waiting(patience))
    (folder / f"pid-{dist.rank()}").write_text(str(os.getpid()))
    if behaviour == "apart":  # each host has its own shared memory
        try:
            check_shared(seen_by_rank_0(), "run_dir='r'", seconds=0.5)
        except ValueError as error:
            (folder / f"apart-{dist.rank()}").write_text(str(error))
    if dist.rank() == 1 and behaviour == "kill":
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGKILL)
    if dist.rank() == 1 and behaviour == "alone":
        time.sleep(60)
    for step in range(10_000):
        activity.note("copy", step, None)
        dist.max_over_ranks(1.0)
        time.sleep(0.01)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--local")]
    end_with_parents()
    # The package has a function of the module's name.
    program = sys.modules["trace_dist.cli.main"]
    program._command = lambda name, values: work(Path(words[0]), words[1])
    sys.exit(program._outcome("train", None))
