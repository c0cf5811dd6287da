"""Lets faults happen in this process, over the product's own seams: phases of the training loop, files, collectives.

Nothing of the product knows of it: what stands here takes the place of methods of ``train.learner`` and ``sharding.comm``, and of
what ``utils.files`` calls to make a file durable.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from faults.grammar import COLLECTIVES, KINDS, Fault
from faults.once import Happened

ERRNO = {
    "enospc": errno.ENOSPC,
    "edquot": errno.EDQUOT,
    "eio": errno.EIO,
    "erofs": errno.EROFS,
    "eacces": errno.EACCES,
}


class Injector:
    """The faults of one process.

    Args:
        faults: all of the job's.
        happened: which of them have happened.
        root: the run folder, whose files faults at the start damage.
    """

    def __init__(self, faults: Sequence[Fault], happened: Happened, root: Path) -> None:
        self._faults, self._happened, self._root = list(enumerate(faults)), happened, root
        self._rank = int(os.environ.get("RANK", "0"))
        self._step, self._writes, self._file = 0, 0, ""
        self._held: list[Any] = []

    def install(self) -> None:
        """Wrap the seams, and damage what is to be damaged at the start."""
        self._damage()
        self._wrap_files()
        self._wrap_training()
        self._wrap_collectives()

    def _due(self, where: str, **seen: Any) -> Iterator[Fault]:
        """The faults of a seam that happen now."""
        for number, fault in self._faults:
            if KINDS[fault.kind].where != where and not (where == "write" and fault.kind == "kill"):
                continue
            options = fault.options
            if where == "write" and not ({"write", "file"} & options.keys()):
                continue
            if where == "moment" and {"write", "file"} & options.keys():
                continue
            if not (where == "numbers" and fault.kind == "spike") and not fault.on_rank(self._rank):
                continue
            if "step" in options and options["step"] != self._step:
                continue
            if "phase" in seen and options.get("phase", "backward") != seen["phase"]:
                continue
            if "part" in seen and _part(fault) != seen["part"]:
                continue
            if "name" in seen and fault.collective != seen["name"]:
                continue
            if "write" in options and options["write"] != self._writes:
                continue
            if where == "write" and options.get("file", "") not in self._file:
                continue
            # on every rank, each of which has it once
            name = f"{number}-on-{self._rank}" if fault.kind == "spike" else number
            if self._happened.first(name, fault, self._step):
                yield fault

    # ---- the training loop

    def _wrap_training(self) -> None:
        from trace_dist.train.learner import DenseLearner, MaskedLearner
        from trace_dist.utils import activity

        note = activity.note

        def noted(part: str, step: int, steps: int | None) -> None:
            self._step = step
            note(part, step, steps)

        activity.note = noted
        self._wrap(MaskedLearner, "accumulate", "data", self._spoil_loss)
        for kind in (MaskedLearner, DenseLearner):
            self._wrap(kind, "forward", "forward")
            self._wrap(kind, "step", "update")
            self._wrap(kind, "save", "checkpoint")
            self._wrap_backward(kind)

    def _wrap(self, kind: type, method: str, phase: str, after: Callable[[Any], Any] | None = None) -> None:
        whole = getattr(kind, method)

        @wraps(whole)
        def wrapped(*args: Any, **options: Any) -> Any:
            self._moment(phase)
            found = whole(*args, **options)
            return found if after is None else after(found)

        setattr(kind, method, wrapped)

    def _wrap_backward(self, kind: type) -> None:
        whole = kind.backward  # type: ignore[attr-defined]

        def backward(learner: Any, loss: Any) -> None:
            self._moment("backward")
            for fault in self._due("numbers", part="gradient"):
                loss = loss * (math.nan if fault.kind == "nan" else math.inf)
            whole(learner, loss)

        kind.backward = backward  # type: ignore[attr-defined]

    def _spoil_loss(self, loss: Any) -> Any:
        for fault in self._due("numbers", part="loss"):
            factors = {"nan": math.nan, "inf": math.inf}
            loss = loss * factors.get(fault.kind, fault.options.get("by", 1.0))
        return loss

    def _moment(self, phase: str) -> None:
        for fault in self._due("moment", phase=phase):
            self._happen(fault)

    def _happen(self, fault: Fault) -> None:
        numbers = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "usr1": signal.SIGUSR1}
        options, pid = fault.options, os.getpid()
        if fault.kind in numbers:
            os.kill(pid, numbers[fault.kind])
        elif fault.kind == "stop":
            if "for" in options:
                subprocess.Popen(
                    ["sh", "-c", f"sleep {options['for']}; kill -CONT {pid}"], start_new_session=True
                )
            os.kill(pid, signal.SIGSTOP)
        elif fault.kind == "segv":
            ctypes.string_at(0)
        elif fault.kind == "exit":
            os._exit(options.get("code", 0))
        elif fault.kind == "raise":
            raise RuntimeError("an injected error")
        elif fault.kind == "sleep":
            time.sleep(options["for"])
        elif fault.kind == "memory":
            self._held.append(bytearray(b"x" * (options["mib"] * 2**20)))
        elif fault.kind == "clock":
            clock, jump = time.time, options["jump"]
            time.time = lambda: clock() + jump

    # ---- files

    def _wrap_files(self) -> None:
        from trace_dist.utils import files

        files.os = _System(self._flush)  # type: ignore[attr-defined]

    def _flush(self, handle: int) -> None:
        """A file is written and becomes durable now; its name is still the temporary one."""
        self._file = os.readlink(f"/proc/self/fd/{handle}")
        is_file = not os.path.isdir(self._file)
        self._writes += is_file
        for fault in self._due("write") if is_file else ():
            if fault.kind in ERRNO:
                raise OSError(ERRNO[fault.kind], os.strerror(ERRNO[fault.kind]))
            if fault.kind == "slow":
                time.sleep(fault.options["for"])
            else:
                self._happen(fault)
        os.fsync(handle)

    # ---- collectives

    def _wrap_collectives(self) -> None:
        from trace_dist.sharding.comm import Comm

        for name in COLLECTIVES:
            setattr(Comm, name, self._late(name, getattr(Comm, name)))

    def _late(self, name: str, whole: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(whole)
        def wrapped(*args: Any, **options: Any) -> Any:
            for fault in self._due("collective", name=name):
                if fault.kind == "lose":
                    raise ConnectionError("an injected loss of the connection")
                time.sleep(fault.options[name])
            return whole(*args, **options)

        return wrapped

    # ---- what lies on the disk

    def _damage(self) -> None:
        if self._rank:
            return
        for number, fault in self._faults:
            if KINDS[fault.kind].where != "start":
                continue
            found = [
                path
                for path in self._root.rglob("*")
                if fault.options["file"] in path.name and path.is_file()
            ]
            if found and self._happened.first(number, fault, 0):
                damage(max(found, key=lambda path: (path.stat().st_mtime_ns, str(path))), fault.kind)


def _part(fault: Fault) -> str:
    """What a fault of numbers spoils."""
    return "loss" if fault.kind == "spike" else str(fault.options.get("in", "gradient"))


class _System:
    """``os`` for ``utils.files``, with an eye on ``fsync``."""

    def __init__(self, flush: Callable[[int], None]) -> None:
        self.fsync = flush

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def damage(path: Path, kind: str) -> None:
    """Damage a file as a fault of this kind does."""
    content = path.read_bytes()
    if kind == "remove":
        path.unlink()
        return
    if kind == "corrupt":
        changed = bytearray(content)
        changed[len(content) // 2] ^= 4
        content = bytes(changed)
    path.write_bytes({"truncate": content[: len(content) // 2], "empty": b""}.get(kind, content))
