"""``trace-dist run``: every stage as the command a user would type, each once; a run that was cut continues.

Stages that touch the sharded target start under the launcher of the config; the others are single processes, several at a
time where the config allows it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from trace_dist.cli.errors import StageFailed
from trace_dist.cli.lifetime import RUN_PID
from trace_dist.config import LaunchConfig, RunConfig
from trace_dist.continual.driver import check_methods
from trace_dist.continual.memory import memory_path
from trace_dist.probe.probe import probe_folder
from trace_dist.probe.project import mask_path
from trace_dist.run_folder import RunFolder
from trace_dist.utils.files import read_json, write_json
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Stage:
    """One command of a run.

    Attributes:
        name: for logs and timings.
        arguments: what follows ``trace-dist``, without the config.
        outputs: files that are there when the stage is done.
        launched: whether it starts under the launcher.
    """

    name: str
    arguments: list[str]
    outputs: list[Path]
    launched: bool = False

    @property
    def done(self) -> bool:
        return all(path.exists() for path in self.outputs)


def plan(cfg: RunConfig) -> list[list[Stage]]:
    """The stages in order; those of one group are independent of each other."""
    one = ["--backend", "single", "--launch.launcher", "none", "--launch.num_ranks", "1"]
    names = [task.name for task in cfg.tasks]
    target = Stage("base target", ["base", "--which", "target", *one], [_made(cfg.target.path)])
    probe = Stage("probe", ["probe", *one], [probe_folder(cfg) / "specificity.json"])
    masks = [mask_path(cfg, name, kind) for name in names for kind in ("projected", "random")]
    launched = [
        entry.name
        for entry in check_methods(cfg)
        if entry.kind.on_ranks and entry.name not in cfg.launch.single_process
    ]
    alone = [_methods(cfg, [name], one) for name in cfg.continual.methods if name not in launched]
    memory = (
        [Stage("memory", ["memory", "measure"], [memory_path(cfg)], launched=True)]
        if cfg.backend == "zero3"
        else []
    )
    project = Stage("project", ["project"], masks, launched=True)
    masked = _methods(cfg, launched, [], masks) if launched else project  # methods on all ranks project first
    make = [target, probe] if cfg.proxy is not None and cfg.proxy.prune is None else [target]
    return [make, [probe], [masked], [*memory, *alone]]


def _made(path: str) -> Path:
    return Path(path) / "config.json"


def _methods(cfg: RunConfig, methods: Sequence[str], options: list[str], masks: Sequence[Path] = ()) -> Stage:
    """Some methods; with ``masks`` on all ranks, which project them where they are missing."""
    arguments = ["continual", "--continual.methods", "[" + ",".join(methods) + "]", *options]
    name = " ".join(["project", *methods] if masks else methods)
    return Stage(
        name, arguments, [*masks, *(RunFolder.of(cfg.run_dir).method(name) for name in methods)], bool(masks)
    )


def run_pipeline(cfg: RunConfig) -> None:
    """Run what is missing, then write the report.

    Raises:
        StageFailed: a stage failed; its own error is printed above.
    """
    signal.signal(signal.SIGTERM, _on_terminate)
    path = Path(cfg.run_dir) / "stages.json"
    timings: dict[str, Any] = read_json(path) if path.is_file() else {"stages": {}, "wall_seconds": 0.0}
    for group in plan(cfg):
        begin, before = time.perf_counter(), timings["wall_seconds"]
        for name, duration in _run_group([stage for stage in group if not stage.done], cfg):
            timings["stages"][name] = duration
            timings["wall_seconds"] = before + time.perf_counter() - begin
            write_json(path, timings)
    from trace_dist.cli.commands import report_command

    report_command(cfg)


def _run_group(stages: list[Stage], cfg: RunConfig) -> Iterator[tuple[str, float]]:
    """Run independent stages, ``parallel_stages`` at a time; yields the name and the seconds of each that ends."""
    waiting, running = list(stages), list[tuple[Stage, float, subprocess.Popen[bytes]]]()
    together = min(len(stages), cfg.launch.parallel_stages)
    try:
        while waiting or running:
            while waiting and len(running) < together:
                running.append((waiting[0], time.perf_counter(), _start(waiting.pop(0), cfg, together)))
            time.sleep(0.1)
            for stage, begin, process in [entry for entry in running if entry[2].poll() is not None]:
                running.remove((stage, begin, process))
                if process.returncode != 0:
                    raise StageFailed(
                        f"stage {stage.name}: failed with exit code {process.returncode}; its error is above. "
                        "Mend it and start the same command again: finished stages are kept"
                    )
                yield stage.name, time.perf_counter() - begin
    finally:
        for _, _, process in running:
            _stop(process)


def _start(stage: Stage, cfg: RunConfig, together: int) -> subprocess.Popen[bytes]:
    """Start a stage beside ``together - 1`` others."""
    logger.info("stage: %s", stage.name)
    words = list(takewhile(lambda argument: not argument.startswith("-"), stage.arguments))
    command = launch_command(cfg.launch, stage.launched) + words
    command += ["--config", str(Path(cfg.run_dir) / "config.yaml"), *stage.arguments[len(words) :]]
    environment = launch_environment(together * (cfg.launch.num_ranks if stage.launched else 1))
    environment[RUN_PID] = str(os.getpid())
    # A session of its own: launchers do not pass signals on to their ranks, so the whole group is stopped.
    return subprocess.Popen(command, env=environment, start_new_session=True)


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


def launch_command(launch: LaunchConfig, launched: bool = True) -> list[str]:
    """How one command is started, up to and including ``-m trace_dist``."""
    ranks, port = str(launch.num_ranks), str(_free_port())
    if not launched or launch.launcher == "none":
        return [sys.executable, "-m", "trace_dist"]
    if launch.launcher == "deepspeed":
        start = ["-m", "deepspeed.launcher.runner", "--num_gpus", ranks, "--master_port", port, "--module"]
        return [sys.executable, *start, "trace_dist"]
    if launch.launcher == "torchrun":
        start = ["-m", "torch.distributed.run", "--nproc_per_node", ranks, "--master_port", port]
        return [sys.executable, *start, "-m", "trace_dist"]
    start = ["-m", "accelerate.commands.launch", "--num_processes", ranks, "--main_process_port", port]
    start += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    start += ["--multi_gpu"]  # its word for several processes; without a GPU they compute on the CPU
    return [sys.executable, *start, "-m", "trace_dist"]


def launch_environment(num_processes: int) -> dict[str, str]:
    """The environment of each of some processes on this machine: they share its cores."""
    environment = dict(os.environ)
    environment["PATH"] = (
        str(Path(sys.executable).parent) + os.pathsep + environment.get("PATH", "")
    )  # ninja lies there
    environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // num_processes))
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    return environment


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
