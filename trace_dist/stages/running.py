"""A stage that is at work: a process with its ranks, the log of what it prints, and what it tells of its progress."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile
from pathlib import Path

from trace_dist.config import LaunchConfig, RunConfig
from trace_dist.launching import (
    ProcessFailed,
    alone_environment,
    followed,
    launch_command,
    ranks_environment,
)
from trace_dist.launching.supervisor import is_loss
from trace_dist.stages.stage import Stage
from trace_dist.utils.codes import LOST
from trace_dist.utils.events import EVENTS, EventReader
from trace_dist.utils.files import writing
from trace_dist.utils.launch import is_launched
from trace_dist.utils.shared_files import APPEARS_SECONDS, comes
from trace_dist.utils.stopping import STOP

NUM_LINES = 15
"""How much of a log is shown at most where a stage fails."""


@dataclass(frozen=True)
class Running:
    """A stage at work.

    Attributes:
        stage: what it does.
        process: the launcher, or the one process.
        log: file with what it prints.
        begin: bytes of the log that were there before.
        events: what it tells.
        started: when, by ``time.perf_counter``.
    """

    stage: Stage
    process: subprocess.Popen[bytes]
    log: Path
    begin: int
    events: EventReader
    started: float

    @property
    def seconds(self) -> float:
        """How long it has been at work."""
        return time.perf_counter() - self.started

    @property
    def stop_file(self) -> Path:
        """Asks it to stop by being there."""
        return self.log.with_suffix(".stop")

    def explain(self) -> None:
        """Print why it failed on standard error; what else it printed is in its log."""
        print(
            *last_words(self.printed().decode("utf-8", errors="replace")),
            sep="\n",
            file=sys.stderr,
            flush=True,
        )

    def printed(self) -> bytes:
        """What it has printed since it began."""
        with self.log.open("rb") as file:
            file.seek(self.begin)
            return file.read()

    def ask_to_stop(self) -> None:
        """Let it end after its step, with a checkpoint."""
        with suppress(OSError):
            self.stop_file.touch()

    def stop(self) -> None:
        """End it with all its ranks; it may have ended by itself."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def close(self) -> None:
        """Delete what it told; its log stays."""
        self.events.path.unlink(missing_ok=True)
        self.stop_file.unlink(missing_ok=True)


def start_stage(stage: Stage, cfg: RunConfig, together: int = 1) -> Running:
    """Start a stage beside ``together - 1`` others; from inside a job, one of a single process.

    Raises:
        ValueError: what it reads is not there, or its log cannot be written.
    """
    stage.check_inputs()
    launch = cfg.launch if stage.launched else LaunchConfig()
    words = list(takewhile(lambda argument: not argument.startswith("-"), stage.arguments))
    command = launch_command(launch) + words
    command += ["--config", str(cfg.folder.config), *stage.arguments[len(words) :]]
    environment = alone_environment() if is_launched() else ranks_environment(launch, together)
    log = cfg.folder.log(stage.name).absolute()
    events = EventReader(log.with_suffix(".events"))
    stop = log.with_suffix(".stop")
    environment |= {
        EVENTS: str(events.path),
        STOP: str(stop),
        "PYTHONUNBUFFERED": "1",
        **followed(os.getpid()),
    }
    with writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        events.path.unlink(missing_ok=True)
        stop.unlink(missing_ok=True)
        with log.open("ab") as file:
            file.write(f"\n{datetime.now():%Y-%m-%d %H:%M:%S} {' '.join(command)}\n".encode())
            file.flush()
            begin = file.tell()
            # A session of its own: launchers do not pass signals on to their ranks, so the whole group is stopped.
            process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
    return Running(stage, process, log, begin, events, time.perf_counter())


def failure(running: Running, code: int) -> ProcessFailed:
    """What is said of a stage that failed, after ``Running.explain``."""
    printed = running.printed()
    lost = code == LOST or any(map(is_loss, printed.splitlines()))
    cure = "Start" if lost else "Mend it and start"
    where = f"its error is above, its log is {running.log}"
    if not printed.endswith(b"\n"):
        free = shutil.disk_usage(running.log.parent).free / 2**20
        where = f"its log {running.log} ends before its error ({free:.1f} MiB are free there)"
    return ProcessFailed(
        f"stage {running.stage.name}: failed with exit code {code}; {where}. "
        f"{cure} the same command again: finished stages are kept",
        *([LOST] if lost else []),
    )


def unfinished(running: Running) -> ProcessFailed | None:
    """What is said of a stage that ended without an error and without its files: DeepSpeed's launcher does so where the program
    that it starts ranks of other hosts with is killed."""
    stage = running.stage
    # Ranks of other hosts may have written them, which this one sees late.
    seconds = APPEARS_SECONDS if stage.launched else 0.0
    missing = next((path for path in stage.outputs if not comes(path.exists, path, seconds)), None)
    if missing is None:
        return None
    return ProcessFailed(
        f"stage {stage.name}: ended without an error, but {missing} is not there, so something has killed its ranks; what they "
        f"said is in {running.log}. Start the same command again: finished stages are kept",
        LOST,
    )


def last_words(text: str) -> list[str]:
    """Why a stage failed, out of what all its ranks printed: their error lines, each once; else the first traceback, since what
    follows it are the launcher's; else the last lines."""
    lines = text.splitlines()
    errors = dict[str, str]()
    for line in lines:
        if line.startswith(("error: ", "error [rank ")):
            errors.setdefault(line.partition(": ")[2], line)
    if errors:
        return list(errors.values())[:NUM_LINES]
    # torch names the rank at the head of each line.
    bare = [re.sub(r"^\[rank\d+\]: ?", "", line) for line in lines]
    first = next((at for at, line in enumerate(bare) if line.startswith("Traceback ")), None)
    if first is None:
        return lines[-NUM_LINES:]
    ends = (at for at in range(first + 1, len(bare)) if bare[at] and not bare[at].startswith(" "))
    return lines[first : next(ends, len(lines)) + 1][-NUM_LINES:]
