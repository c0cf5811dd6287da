"""Small masked trainings as users start them, under a launcher, with faults in them; and started again as a user would."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from cli.program import is_alive, make_config, processes_with, write_config, write_tasks
from faults.forked import ForkedJob, Parent
from faults.grammar import Fault
from faults.once import Happened
from hosts.namespaces import Hosts, environment

from trace_dist.cli.main import main
from trace_dist.masks import Mask, UnitLayout

ROOT = Path(__file__).parents[2]
ALONE = ["--backend", "single", "--launch.launcher", "none", "--launch.num_ranks", "1"]
Started = subprocess.Popen[bytes] | ForkedJob
_PARENTS: list[Parent] = []
LONGEST = 240.0
"""Seconds that a start may take before it counts as one that hangs."""


@dataclass(frozen=True)
class Setting:
    """How a job is started.

    Attributes:
        launcher: deepspeed, torchrun, accelerate, or forked (``faults.forked``).
        ranks: how many.
        backend: zero3 or fsdp2.
        options: further arguments of the command.
        hosts: where; None is this machine.
        around: what stands before the command line, such as a limit on memory.
    """

    launcher: str = "forked"
    ranks: int = 2
    backend: str = "fsdp2"
    options: tuple[str, ...] = ()
    hosts: Hosts | None = None
    around: tuple[str, ...] = ()

    @property
    def kind(self) -> tuple[object, ...]:
        """What the bits of its result depend on."""
        return self.ranks, self.backend, self.options


@dataclass
class Ended:
    """How a start ended.

    Attributes:
        code: exit code; None where it had to be killed as it hung.
        said: all that it printed.
        seconds: until all of its processes were gone.
        ended_at: when, ``time.monotonic``.
        left: processes that were still there some seconds after it.
        continued: the step after which it went on; 0 where it began anew.
        going_at: when its first step was written down, ``time.monotonic``; None where it did not come so far.
    """

    code: int | None
    said: str
    seconds: float
    ended_at: float
    left: list[int] = field(default_factory=list)
    continued: int = 0
    going_at: float | None = None

    def errors(self) -> list[str]:
        """What explains a failure, each once: a forked rank has no launcher that ends it before it says the same as rank 0."""
        found = (re.match(r"error(?: \[rank \d+\])?: (.*)", line) for line in self.said.splitlines())
        return list(dict.fromkeys(match[1] for match in found if match))


def prepare(folder: Path, steps: int, every: int = 3) -> None:
    """Tasks, a configuration, a mask, and the base, which this process makes."""
    write_tasks(folder)
    config = make_config(folder) | {"backend": "fsdp2"}
    config["tasks"], config["bank"]["layer"] = config["tasks"][:1], 0
    config["train"] |= {"steps": steps, "log_every": 1, "checkpoint_every": every, "trackers": []}
    config["launch"] = {"silence_seconds": 10.0, "stuck_minutes": 0.25}
    write_config(folder, config)
    name, units = "model.layers.0.mlp.up_proj.weight", torch.arange(48, dtype=torch.int32)
    Mask({name: units}, {name: UnitLayout((48, 32), 32)}, "row").save(folder / "mask.safetensors")
    if main(["base", "--config", str(folder / "config.yaml"), "--which", "target", *ALONE]) != 0:
        raise RuntimeError("the base could not be made")


class Job:
    """One training with files of its own: the same command, started as often as it takes.

    Args:
        work: what ``prepare`` has filled.
        name: of the job, and of its run folder.
        setting: how it is started.
    """

    def __init__(self, work: Path, name: str, setting: Setting) -> None:
        self.work, self.name, self.setting = work, name, setting
        self.folder = work / name
        shutil.rmtree(self.folder, ignore_errors=True)
        self.run, self.notes, self.log = (self.folder / part for part in ("run", "notes", "log.txt"))
        self.notes.mkdir(parents=True)
        self.log.write_bytes(b"")
        config = yaml.safe_load((work / "config.yaml").read_text())
        config |= {"run_dir": str(self.run), "backend": setting.backend}
        self.config = write_config(self.folder, config)
        self.mask = self.folder / "given.safetensors"
        shutil.copy(work / "mask.safetensors", self.mask)
        self.faults: list[str] = []
        self._timers: list[tuple[float, Callable[[], object]]] = []

    def words(self) -> list[str]:
        """The command and its arguments."""
        launch = yaml.safe_load(self.config.read_text())["launch"]
        own = ["--config", str(self.config), "--mask_file", str(self.mask)]
        waiting = [f"--launch.{name}={launch[name]}" for name in ("silence_seconds", "stuck_minutes")]
        return ["train", *own, *waiting, *self.setting.options]

    def command(self) -> list[str]:
        """What a user types, with the tests' entry point in place of the product's."""
        launch = yaml.safe_load(self.config.read_text())["launch"] | {
            "launcher": self.setting.launcher,
            "num_ranks": self.setting.ranks,
        }
        if self.setting.hosts is not None:
            launch |= {"hostfile": str(self.setting.hosts.hostfile)}
        words = [
            *self.setting.around,
            *(sys.executable, "-m", "trace_dist.launching.supervisor", json.dumps(launch), "faults.entry"),
            *self.words(),
        ]
        return words if self.setting.hosts is None else self.setting.hosts.on(1, *words)

    def environment(self, faults: str) -> dict[str, str]:
        tests = ROOT / "tests"
        paths = (ROOT, ROOT / "kernels", tests, tests / "cli")
        own = {
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "HF_DATASETS_CACHE": str(self.work / "cache"),
            "TRACE_DIST_FAULTS": faults,
            "TRACE_DIST_FAULTS_NOTES": str(self.notes),
            "TRACE_DIST_FAULTS_ROOT": str(self.folder),
        }
        return environment() | own

    def start(self, faults: str = "", meanwhile: Callable[[Job, Started], object] | None = None) -> Ended:
        """Start the command, and wait until all of it is gone.

        Args:
            faults: ``TRACE_DIST_FAULTS``.
            meanwhile: called every tenth of a second while it runs, for faults from outside.
        """
        begin, size = time.monotonic(), self.log.stat().st_size
        going: float | None = None
        before = len(self.lines())
        process = self._begin(faults)
        hangs = False
        while process.poll() is None:
            if going is None and len(self.lines()) > before:
                going = time.monotonic()
            if meanwhile is not None:
                meanwhile(self, process)
            self._act()
            if time.monotonic() - begin > LONGEST:
                hangs = True
                for pid in self.processes(process):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        left = self._await_the_end(process)
        ended_at = time.monotonic()
        said = self.log.read_bytes()[size:].decode(errors="replace")
        found = re.search(r"continuing after step (\d+)", said)
        return Ended(
            code=None if hangs else process.returncode,
            said=said,
            seconds=ended_at - begin,
            ended_at=ended_at,
            left=left,
            continued=int(found[1]) if found else 0,
            going_at=going,
        )

    def _begin(self, faults: str) -> Started:
        if self.setting.launcher == "forked":
            own = {"folder": str(self.work), "log": str(self.log), "ranks": self.setting.ranks}
            return self.parent().start(own | {"environment": self.environment(faults), "words": self.words()})
        with self.log.open("ab") as log:
            return subprocess.Popen(
                self.command(), env=self.environment(faults), cwd=self.work, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def parent(self) -> Parent:
        """The process that forks ranks; one for all jobs."""
        if not _PARENTS:
            _PARENTS.append(Parent(self.environment("")))
        return _PARENTS[0]

    def _await_the_end(self, process: Started, seconds: float = 20.0) -> list[int]:
        deadline = time.monotonic() + seconds
        while self.processes(process) and time.monotonic() < deadline:
            time.sleep(0.1)
        left = self.processes(process)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return left

    def processes(self, process: Started) -> list[int]:
        """What runs of it."""
        if isinstance(process, ForkedJob):
            return [pid for pid in process.pids if is_alive(pid)]
        return processes_with(str(self.config))

    def is_rank(self, pid: int) -> bool:
        """Whether one of its processes is a rank."""
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return words[1:3] == [b"-m", b"faults.entry"] or words[1:4] == [b"-u", b"-m", b"faults.entry"]

    def note(self, what: str, step: int) -> None:
        """Note a fault from outside."""
        Happened(self.notes).first(1000 + len(self.happened()), Fault("outside", text=what), step)

    def after(self, seconds: float, act: Callable[[], object]) -> None:
        """Do something while it runs, after some time."""
        self._timers.append((time.monotonic() + seconds, act))

    def _act(self) -> None:
        for timer in [timer for timer in self._timers if timer[0] <= time.monotonic()]:
            self._timers.remove(timer)
            timer[1]()

    def lines(self) -> list[dict[str, Any]]:
        """What metrics.jsonl has."""
        path = self.run / "metrics.jsonl"
        if not path.is_file():
            return []
        whole = path.read_text().split("\n")[:-1]
        return [json.loads(line) for line in whole]

    def last_step(self) -> int:
        """The last step that was written down."""
        return max((line["step"] for line in self.lines()[-1:]), default=0)

    def checkpoint(self) -> int:
        """The step of the newest checkpoint that was announced."""
        folders = (self.run / "checkpoints").rglob("step-*/manifest.json")
        return max((int(path.parent.name.removeprefix("step-")) for path in folders), default=0)

    def happened(self) -> Sequence[dict[str, Any]]:
        """The faults that have happened."""
        return Happened(self.notes).notes()

    def delta(self) -> bytes | None:
        """What the training has made."""
        path = self.run / "deltas" / "copy.safetensors"
        return path.read_bytes() if path.is_file() else None

    def remove(self) -> None:
        """Remove its files."""
        shutil.rmtree(self.folder, ignore_errors=True)
