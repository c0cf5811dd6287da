"""Starts a module on the ranks of a configuration, and answers for them: what ends one ends all, and its exit code says why.

    python -m trace_dist.launching.supervisor LAUNCH_AS_JSON MODULE ARGUMENTS...

SIGTERM and SIGINT end all ranks on all hosts. SIGUSR1 asks them to stop after their step, with a checkpoint. What ranks print
passes through here, so that a loss of contact is known whatever exit code a launcher makes of it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from trace_dist.config import LaunchConfig
from trace_dist.launching.commands import Start, not_startable, starts
from trace_dist.launching.ending import end_tree
from trace_dist.launching.environment import RUN_PID, followed
from trace_dist.launching.scratch import scratch_folder
from trace_dist.utils.codes import FAILED, LOST
from trace_dist.utils.stopping import GRACE_SECONDS, STOP, signals

OTHERS_SECONDS = 20.0
"""How long other hosts may go on after one has failed: each has its own last words."""
LOST_SECONDS = 8.0
"""How long launchers may go on after a rank has said that another one is lost. The others end by themselves; one that is stopped
does not, and torchrun waits for it for half a minute."""
_LOST = re.compile(rb"^error( \[rank \d+\])?: lost contact: |^ *exitcode *: -9 |exits with return code = -9$")

_ERROR = re.compile(rb"^error( \[rank \d+\])?: ")


def is_loss(line: bytes) -> bool:
    """Whether a rank says in a line that another one was lost, or torchrun or DeepSpeed that one was killed."""
    return _LOST.search(line.rstrip()) is not None


class Supervisor:
    """Processes that make one job.

    Args:
        begun: what to start.
        environment: of all of them.

    Raises:
        ValueError: a program is not there; nothing runs then.
    """

    def __init__(self, begun: Iterable[Start], environment: dict[str, str]) -> None:
        self._lost_at: float | None = None
        self._explained = False
        self._signal, self._asked = 0, 0.0
        self._environment = environment
        self._stop_file = Path(environment[STOP])
        self._copies: list[threading.Thread] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        for start in begun:
            try:
                self._processes.append(self._begin(start))
            except OSError as error:
                # Those that were begun would wait for it.
                self.end()
                raise ValueError(not_startable(start.command[0], error)) from None

    def _begin(self, start: Start) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            start.command,
            env=self._environment | start.environment,
            # ssh passes its end on, and the tether there ends its ranks.
            stdin=subprocess.PIPE if start.host else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for source, sink in ((process.stdout, sys.stdout.buffer), (process.stderr, sys.stderr.buffer)):
            assert source is not None
            thread = threading.Thread(target=self._copy, args=(source, sink), daemon=True)
            thread.start()
            self._copies.append(thread)
        return process

    def _copy(self, source: BinaryIO, sink: BinaryIO) -> None:
        for line in source:
            if self._lost_at is None and is_loss(line):
                self._lost_at = time.monotonic()
            self._explained |= _ERROR.match(line) is not None
            # Launchers and ranks that Ctrl+C ends tell where they were, each in a traceback of its own.
            if self._signal == signal.SIGINT:
                continue
            with suppress(OSError):
                sink.write(line)
                sink.flush()

    def on_signal(self, number: int, _: FrameType | None) -> None:
        """Ask the ranks to stop, or end them."""
        if number in signals() and not self._asked:
            self._asked = time.monotonic()
            self._stop_file.touch()
        elif number not in signals():
            self._signal = number

    def wait(self) -> int:
        """Until all have ended; the exit code of the whole."""
        failed_at = None
        while any(process.poll() is None for process in self._processes):
            now = time.monotonic()
            if failed_at is None and any(process.poll() for process in self._processes):
                failed_at = now
            limits = (
                (failed_at, OTHERS_SECONDS),
                (self._lost_at, LOST_SECONDS),
                (self._asked or None, GRACE_SECONDS),
            )
            if self._signal or any(_over(since, seconds) for since, seconds in limits):
                self.end()
            time.sleep(0.1)
        for thread in self._copies:
            thread.join(timeout=5)
        return self._code()

    def end(self) -> None:
        """End what still runs, on all hosts at the same time."""
        alive = [process for process in self._processes if process.poll() is None]
        for process in alive:
            if process.stdin is not None:
                process.stdin.close()
        threads = [threading.Thread(target=end_tree, args=(process.pid,)) for process in alive]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _code(self) -> int:
        codes = [process.returncode for process in self._processes]
        if self._signal:
            return 128 + self._signal
        if any(codes) and (self._asked or self._lost_at is not None or LOST in codes):
            return LOST
        # torchrun and accelerate make 1 of it.
        if any(codes) and self._explained:
            return FAILED
        return next((code if code > 0 else 128 - code for code in codes if code), 0)


def _over(since: float | None, seconds: float) -> bool:
    return since is not None and time.monotonic() - since > seconds


def supervise(launch: LaunchConfig, module: str, words: Sequence[str]) -> int:
    """Start a module on the ranks of a configuration, and wait for them.

    Returns:
        Exit code: 0; 75 where the same command, started again, goes on; 2 where a rank has explained an error; 128 and a signal's
        number that ended it; else that of the first launcher that failed.

    Raises:
        ValueError: the hosts are not as they must be, or a launcher is missing.
    """
    environment = dict(os.environ)
    with scratch_folder() as scratch:
        environment.setdefault(STOP, f"{scratch}/stop")
        if RUN_PID not in environment:
            environment |= followed(os.getpid())
        environment["PYTHONUNBUFFERED"] = "1"
        # Signals that come before there is anybody to pass them on to.
        early: list[int] = []
        before = _handle(lambda number, frame: early.append(number))
        try:
            supervisor = Supervisor(starts(launch, module, words, environment, scratch), environment)
            _handle(supervisor.on_signal)
            for number in early:
                supervisor.on_signal(number, None)
            try:
                return supervisor.wait()
            finally:
                supervisor.end()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _handle(handler: Callable[[int, FrameType | None], object]) -> dict[int, Any]:
    """Let a function handle what asks and what ends; what did so before."""
    numbers = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, *signals()}
    return {number: signal.signal(number, handler) for number in numbers}


if __name__ == "__main__":
    settings, name, *rest = sys.argv[1:]
    try:
        sys.exit(supervise(LaunchConfig(**json.loads(settings)), name, rest))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
