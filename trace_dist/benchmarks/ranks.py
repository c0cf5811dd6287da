"""One rank of a benchmark's job."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from trace_dist.utils import dist
from trace_dist.utils.files import write_json


def run_rank(measure: Callable[[], Any], out: Path) -> NoReturn:
    """Measure together with the other ranks, let rank 0 write what it found as JSON, and end the process."""
    dist.ensure_group()
    found = measure()
    if dist.is_main():
        write_json(out, found)
    dist.barrier()
    # DeepSpeed's destructors take seconds and print.
    os._exit(0)
