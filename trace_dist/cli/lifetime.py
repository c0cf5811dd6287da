"""No process of a job outlives what started it, however that ended; but it may outlive its terminal."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from trace_dist.launching import run_process
from trace_dist.utils.launch import is_launched

PROGRAMS = ("deepspeed", "torchrun", "accelerate", "accelerate-launch")
MODULES = ("deepspeed.launcher.", "torch.distributed.run", "accelerate.commands.", "trace_dist.launching.")
"""Programs and modules of launchers, as they stand in the command lines of their processes."""
ENDED = 143
"""Exit code as after SIGTERM."""


def end_with_parents() -> None:
    """End this process as soon as the run that started it is gone, or its launcher, were they killed so hard that they could
    not stop it. DeepSpeed's launcher, for one, passes no signal on to its ranks."""
    run, handles = run_process(), list[int]()
    followed = [run[0]] if run is not None and run[1] == socket.gethostname() else []
    for pid in [*followed, *_launchers()]:
        try:
            handles.append(os.pidfd_open(pid))
        except ProcessLookupError:
            os._exit(ENDED)
    if not handles:
        return

    def wait() -> None:
        select.select(handles, [], [])
        # From a thread, while the main thread may hang in a collective: nothing milder ends the process.
        os._exit(ENDED)

    threading.Thread(target=wait, name="end with parents", daemon=True).start()


@cache
def outlive_terminals() -> None:
    """From now on what is written to a terminal that has gone is lost, and no error: a job that its shell was told to leave alone
    (``disown``) is not ended with the terminal, and goes on."""
    shown = [number for number in (1, 2) if os.isatty(number)]
    if not shown:
        return

    def wait() -> None:
        terminals = select.poll()
        for number in shown:
            # That it hangs up is told unasked.
            terminals.register(number, 0)
        gone = terminals.poll()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number, _ in gone:
            os.dup2(nowhere, number)

    threading.Thread(target=wait, name="outlive terminals", daemon=True).start()


def _launchers() -> Iterator[int]:
    """The processes above this one that are its launcher's, where a launcher started it."""
    pid = os.getppid() if is_launched() else 0
    while pid > 1:
        with suppress(OSError):
            process = Path("/proc") / str(pid)
            command = process.joinpath("cmdline").read_bytes().split(b"\0")
            # The program and its module or script; what follows are arguments.
            words = [os.path.basename(os.fsdecode(word)) for word in command[:4]]
            if any(word in PROGRAMS or word.startswith(MODULES) for word in words):
                yield pid
                pid = int(process.joinpath("stat").read_text().rpartition(")")[2].split()[1])
                continue
        return
