"""``trace-dist run``: every stage as the command a user would type, each once; a run that was cut continues.

Stages that touch the sharded target start under the launcher of the config; the others are single processes, several at a
time where the config allows it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import takewhile
from typing import Any

from trace_dist.config import LaunchConfig, RunConfig
from trace_dist.launching import (
    RUN_PID,
    ProcessFailed,
    alone_environment,
    launch_command,
    launch_environment,
)
from trace_dist.stages import base, continual, memory, probe, project
from trace_dist.stages.stage import Stage
from trace_dist.utils import dist
from trace_dist.utils.files import read_json, write_json
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)


def stage_groups(cfg: RunConfig) -> list[list[Stage]]:
    """The stages in order; those of one group are independent of each other."""
    target, probed = base.describe(cfg, "target"), probe.describe(cfg)
    launched = [method for method in cfg.continual.methods if continual.runs_on_ranks(cfg, method)]
    alone = [continual.describe(cfg, [name]) for name in cfg.continual.methods if name not in launched]
    masked = continual.describe(cfg, launched) if launched else project.describe(cfg)
    states = [memory.describe(cfg)] if cfg.backend == "zero3" else []
    # A proxy that is cut out of the target waits for it.
    make = [target, probed] if cfg.proxy is not None and cfg.proxy.prune is None else [target]
    return [make, [probed], [masked], [*states, *alone]]


def run_pipeline(cfg: RunConfig, groups: list[list[Stage]]) -> None:
    """Run what is missing.

    Args:
        cfg: the run.
        groups: its stages in order; those of one group are independent of each other.

    Raises:
        ProcessFailed: a stage failed; its own error is printed above.
    """
    signal.signal(signal.SIGTERM, _on_terminate)
    path = cfg.folder.stages
    timings: dict[str, Any] = read_json(path) if path.is_file() else {"stages": {}, "wall_seconds": 0.0}
    for group in groups:
        begin, before = time.perf_counter(), timings["wall_seconds"]
        for name, duration in _run_group([stage for stage in group if not stage.done], cfg):
            timings["stages"][name] = duration
            timings["wall_seconds"] = before + time.perf_counter() - begin
            write_json(path, timings)


def _run_group(stages: list[Stage], cfg: RunConfig) -> Iterator[tuple[str, float]]:
    """Run independent stages, ``parallel_stages`` at a time; yields the name and the seconds of each that ends."""
    waiting, running = list(stages), list[tuple[Stage, float, subprocess.Popen[bytes]]]()
    together = min(len(stages), cfg.launch.parallel_stages)
    try:
        while waiting or running:
            while waiting and len(running) < together:
                running.append((waiting[0], time.perf_counter(), start_stage(waiting.pop(0), cfg, together)))
            time.sleep(0.1)
            for stage, begin, process in [entry for entry in running if entry[2].poll() is not None]:
                running.remove((stage, begin, process))
                if process.returncode != 0:
                    raise failure(stage, process.returncode)
                yield stage.name, time.perf_counter() - begin
    finally:
        for _, _, process in running:
            _stop(process)


def start_stage(stage: Stage, cfg: RunConfig, together: int = 1) -> subprocess.Popen[bytes]:
    """Start a stage beside ``together - 1`` others; from inside a job, one of a single process."""
    logger.info("stage: %s", stage.name)
    stage.check_inputs()
    launch = cfg.launch if stage.launched else LaunchConfig()
    words = list(takewhile(lambda argument: not argument.startswith("-"), stage.arguments))
    command = launch_command(launch) + words
    command += ["--config", str(cfg.folder.config), *stage.arguments[len(words) :]]
    in_job = dist.world_size() > 1
    environment = alone_environment() if in_job else launch_environment(together * launch.num_ranks)
    environment[RUN_PID] = str(os.getpid())
    # A session of its own: launchers do not pass signals on to their ranks, so the whole group is stopped.
    return subprocess.Popen(command, env=environment, start_new_session=True)


def failure(stage: Stage, code: int) -> ProcessFailed:
    """What is said of a stage that failed."""
    return ProcessFailed(
        f"stage {stage.name}: failed with exit code {code}; its error is above. "
        "Mend it and start the same command again: finished stages are kept"
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a stage with all its ranks; it may have ended by itself since."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _on_terminate(number: int, _: object) -> None:
    """Leave through the ``finally`` blocks, which stop the stages."""
    sys.exit(128 + number)
