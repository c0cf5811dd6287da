"""Ranks as forks of one process that has imported everything: a start takes a second, where a launcher's takes many.

    python -m faults.forked

reads a job per line of its standard input, as JSON, and answers with the process ids of its ranks and, once all have ended, with
their exit codes. The ranks meet and end as they do under a launcher; what launchers add is left to the jobs that have one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from launching import free_port
from warm.server import warm

from trace_dist.utils.codes import LOST


class ForkedJob:
    """A job under way; looks like a ``Popen``.

    Attributes:
        pids: of its ranks.
        codes: their exit codes, once all have ended; as of ``Popen``.
        returncode: what a scheduler would be told: 75 where a rank was lost.
    """

    def __init__(self, parent: Parent, pids: list[int]) -> None:
        self._parent, self.pids, self.codes = parent, pids, list[int]()
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and (answer := self._parent.answer()) is not None:
            self.codes = answer["codes"]
            lost = any(code == LOST or code < 0 for code in self.codes)
            self.returncode = LOST if lost else next((code for code in self.codes if code), 0)
        return self.returncode


class Parent:
    """The process that forks."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "faults.forked"],
            env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        self._out, self._in = self._process.stdout, self._process.stdin
        self._read = b""
        os.set_blocking(self._out.fileno(), False)

    def start(self, job: Mapping[str, Any]) -> ForkedJob:
        self._in.write(json.dumps(dict(job)).encode() + b"\n")
        self._in.flush()
        while (answer := self.answer()) is None:
            if self._process.poll() is not None:
                raise RuntimeError("the process that forks has ended")
        return ForkedJob(self, answer["pids"])

    def answer(self) -> dict[str, Any] | None:
        """The next thing that it says, if there is one."""
        self._read += self._out.read() or b""
        line, newline, rest = self._read.partition(b"\n")
        if not newline:
            return None
        self._read = rest
        return dict(json.loads(line))

    def close(self) -> None:
        self._in.close()
        self._process.wait()


def rank(job: Mapping[str, Any], number: int, port: int) -> None:
    """Become a rank; does not return."""
    os.setsid()
    log, nothing = (
        os.open(job["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT),
        os.open(os.devnull, os.O_RDONLY),
    )
    for own, other in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(own, other)
    os.chdir(job["folder"])
    ranks = str(job["ranks"])
    os.environ |= job["environment"] | {
        "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    sys.argv = ["trace-dist", *job["words"]]
    from faults.entry import main

    sys.exit(main())


def main(lines: Sequence[str] | Any = sys.stdin) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warm()
    for line in lines:
        job, port, pids = json.loads(line), free_port(), list[int]()
        for number in range(job["ranks"]):
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                rank(job, number, port)
            pids.append(pid)
        print(json.dumps({"pids": pids}), file=answers, flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps({"codes": codes}), file=answers, flush=True)


if __name__ == "__main__":
    main()
