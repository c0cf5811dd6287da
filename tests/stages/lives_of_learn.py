"""``learn`` that is killed and started again: ``lives_of_learn.py FOLDER CONFIG TASK``, into FOLDER/whole/bank and copies of it.

A life may end at a moment, a regular expression for an event of ``moments.watch``: its process, and the stage that was at work,
get a real SIGKILL. The imports are done once: a life is a fork of the process that has done nothing else, and a stage is a fork
of its life. Otherwise both are the program.
"""

from __future__ import annotations

import gc
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch.utils.tensorboard  # noqa: F401  a life would import it anew
from launching import free_port
from moments import watch

from trace_dist.cli import commands  # noqa: F401
from trace_dist.cli.main import main as program
from trace_dist.sharding import fsdp2  # noqa: F401
from trace_dist.stages import running
from trace_dist.train import task  # noqa: F401


def forked(words: list[str], environment: Mapping[str, str], log: IO[bytes]) -> int:
    """Run the program in a process of its own, which writes into a file; its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        os.environ.clear()
        os.environ.update(environment)
        code = program(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        os._exit(code)


class Stage:
    """``subprocess.Popen`` of a stage, but forked."""

    def __init__(self, command: list[str], *, env: Mapping[str, str], stdout: IO[bytes], **_: Any) -> None:
        self.returncode: int | None = None
        self.pid = forked(command[command.index("trace_dist") + 1 :], env, stdout)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        del timeout  # a process that was killed has ended
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def die_at(moment: str, folder: Path) -> None:
    """Kill the command that started all, and this process, at a moment."""

    def happened(event: str) -> None:
        if re.fullmatch(moment, event):
            os.kill(int(os.environ.get("TRACE_DIST_RUN_PID", os.getpid())), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    watch(folder, happened)


def live(folder: Path, words: list[str], ranks: int, moment: str | None) -> list[int]:
    """One life; the exit codes of its ranks, negative where a signal ended them."""
    port, pids = str(free_port()), list[int]()
    if (child := os.fork()) == 0:
        if moment is not None:
            die_at(moment, folder)
        with (folder / "lives.log").open("ab") as log:
            for rank in range(ranks):
                number = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                place = {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                pids.append(forked(words, os.environ | (number | place if ranks > 1 else {}), log))
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        (folder / "codes.txt").write_text(" ".join(map(str, codes)))
        os._exit(0)
    os.waitpid(child, 0)
    return [int(code) for code in (folder / "codes.txt").read_text().split()]


def lives(folder: Path, config: str, ranks: int, *moments: str | None) -> None:
    """Lives that end at moments; one without a moment ends by itself. Exits with 1 where one did otherwise."""
    words = ["learn", "--config", config, "--bank", str(folder / "bank")]
    if ranks > 1:
        words += ["--backend", "fsdp2", "--launch.launcher", "torchrun", "--launch.num_ranks", str(ranks)]
    for moment in moments:
        codes = live(folder, words, ranks, moment)
        # One process is killed, and then no other comes to its end.
        fine = not any(codes) if moment is None else codes.count(-signal.SIGKILL) == 1 and 0 not in codes
        if not fine:
            sys.exit(f"moment {moment!r}: exit codes {codes}\n{(folder / 'lives.log').read_text()[-6000:]}")


def main() -> None:
    """All lives: of ``whole`` and ``whole-ranks`` nobody is killed, of ``killed`` and ``killed-ranks`` all but the last."""
    folder, config, name = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    work = f"bank.work/{name}"
    running.subprocess = SimpleNamespace(  # type: ignore[assignment]
        Popen=Stage, STDOUT=subprocess.STDOUT, TimeoutExpired=subprocess.TimeoutExpired
    )
    gc.freeze()  # lives need not walk through the modules
    probed, masked = f"replace {work}/probe/{name}.safetensors", f"replace {work}/masks/{name}.safetensors"
    inside = f"rename {work}/checkpoints/retrieved/{name}/step-00000002"
    shutil.copytree(folder / "whole", folder / "killed")
    lives(folder / "whole", config, 1, None)
    lives(folder / "killed", config, 1, probed, masked)
    # What one process does alone is done; two ranks go on from there.
    for ranks in ("whole-ranks", "killed-ranks"):
        shutil.copytree(folder / "killed", folder / ranks)
    lives(folder / "killed", config, 1, inside, "rename bank/tasks/.*", None)
    lives(folder / "whole-ranks", config, 2, None)
    lives(folder / "killed-ranks", config, 2, inside, None)


if __name__ == "__main__":
    main()
