"""A benchmark's job: its own module, started on some ranks, and what each rank does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from trace_dist.config import LaunchConfig
from trace_dist.launching import ProcessFailed, launch_command, launch_environment
from trace_dist.utils import dist
from trace_dist.utils.files import read_json, write_json


def run_job(module: str, asked: Mapping[str, Any], num_ranks: int) -> dict[str, Any]:
    """What a job on fresh ranks found, one thread each.

    Args:
        module: whose ``__main__`` calls ``run_rank``.
        asked: JSON-ready, for every rank.
        num_ranks: of the job.

    Raises:
        ProcessFailed: the job failed. The first line has the last exception of its ranks.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [*launch_command(LaunchConfig("torchrun", num_ranks), module), json.dumps(asked), str(out)]
        done = subprocess.run(
            command,
            env=launch_environment(num_threads=1),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            raise ProcessFailed(f"{module}: {_cause(done.stderr)}\n{done.stderr[-2000:]}")
        return read_json(out)


def _cause(stderr: str) -> str:
    """The last exception in the ranks' standard error."""
    lines = [line for line in stderr.splitlines() if "Error: " in line and "ChildFailed" not in line]
    return lines[-1].split("]: ")[-1][:200] if lines else "no message"


def run_rank(measure: Callable[[dict[str, Any]], Any]) -> NoReturn:
    """Measure what ``run_job`` asked together with the other ranks, let rank 0 write what it found, and end the process."""
    asked, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    dist.ensure_group()
    found = measure(asked)
    if dist.is_main():
        write_json(out, found)
    dist.barrier()
    # DeepSpeed's destructors take seconds and print.
    os._exit(0)
