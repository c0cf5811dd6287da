"""What ``TRACE_DIST_FAULTS`` may say.

    kill@rank=1,step=7,phase=backward; enospc@write=3; corrupt@file=manifest; delay@all_to_all=5s; nan@rank=0,step=3

Faults are separated by semicolons. Each is a kind, and behind ``@`` what it waits for and how strong it is, as ``key=value`` with
commas between. Each happens once in a job, however often the job is started again (``faults.once``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

PHASES = ("data", "forward", "backward", "update", "checkpoint")
"""Where a training step may be: it asks for its batch, or begins to do one of these."""
COLLECTIVES = ("all_to_all", "any", "all_gather", "sum", "max", "objects", "barrier")
"""Methods of ``sharding.comm.Comm``."""
MOMENT = ("rank", "step", "phase")
WRITE = ("rank", "write", "file")
UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
TYPES = {
    "rank": "number",
    "step": "number",
    "write": "number",
    "code": "number",
    "mib": "number",
    "by": "factor",
    "for": "time",
    "jump": "time",
    **dict.fromkeys(COLLECTIVES, "time"),
    "phase": "phase",
    "file": "text",
    "in": "part",
}
"""Key -> what stands behind its ``=``."""
EXAMPLES = {
    "number": "7",
    "factor": "50",
    "time": "5s, 200ms, 2m, 1h or -1d",
    "phase": f"one of {', '.join(PHASES)}",
    "text": "a part of a file's name",
    "part": "loss or gradient",
}


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        what: what happens, for the table of docs/reliability.md.
        keys: which it takes.
        needs: those that must be given; one of several where they are joined by ``|``.
        where: the seam: ``moment`` of the training, ``write``, ``collective``, ``start`` of the process, ``numbers``.
    """

    what: str
    keys: tuple[str, ...]
    where: str
    needs: tuple[str, ...] = ()


KINDS: dict[str, Kind] = {
    "kill": Kind(
        "SIGKILL to the rank, at a moment or when a file is written", (*MOMENT, "write", "file"), "moment"
    ),
    "term": Kind("SIGTERM to the rank", MOMENT, "moment"),
    "usr1": Kind("SIGUSR1 to the rank: it is asked to stop", MOMENT, "moment"),
    "segv": Kind("the rank dies by a memory fault", MOMENT, "moment"),
    "exit": Kind("the rank ends without a word, with exit code `code`", (*MOMENT, "code"), "moment"),
    "raise": Kind("an error of the program", MOMENT, "moment"),
    "stop": Kind("SIGSTOP to the rank; SIGCONT after `for`, or never", (*MOMENT, "for"), "moment"),
    "sleep": Kind("the rank works alone for `for`", (*MOMENT, "for"), "moment", ("for",)),
    "memory": Kind("the rank takes `mib` MiB more", (*MOMENT, "mib"), "moment", ("mib",)),
    "clock": Kind("the rank's clock jumps by `jump`", (*MOMENT, "jump"), "moment", ("jump",)),
    "nan": Kind("loss or gradient (`in`) of the rank is NaN", ("rank", "step", "in"), "numbers"),
    "inf": Kind("loss or gradient (`in`) of the rank is infinite", ("rank", "step", "in"), "numbers"),
    "spike": Kind("the loss of all ranks is `by` times as high", ("step", "by"), "numbers", ("step", "by")),
    "enospc": Kind("no space left on the device", WRITE, "write"),
    "edquot": Kind("the disk quota is used up", WRITE, "write"),
    "eio": Kind("an input/output error", WRITE, "write"),
    "erofs": Kind("the file system has become read-only", WRITE, "write"),
    "eacces": Kind("permission denied", WRITE, "write"),
    "slow": Kind("a write takes `for`", (*WRITE, "for"), "write", ("for",)),
    "delay": Kind("a collective begins late, by its `=time`", ("rank", "step", *COLLECTIVES), "collective"),
    "lose": Kind("a collective fails: the connection is gone", ("rank", "step", *COLLECTIVES), "collective"),
    "corrupt": Kind("a bit of the newest such file is flipped", ("file",), "start", ("file",)),
    "truncate": Kind("the newest such file ends in its middle", ("file",), "start", ("file",)),
    "empty": Kind("the newest such file is empty", ("file",), "start", ("file",)),
    "remove": Kind("the newest such file is gone", ("file",), "start", ("file",)),
}


@dataclass(frozen=True)
class Fault:
    """A fault that is to happen.

    Attributes:
        kind: which.
        options: the values behind its keys: numbers as int, factors and times (seconds) as float.
        text: as it was written.
    """

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    text: str = ""

    def on_rank(self, rank: int) -> bool:
        """Whether this rank has it; rank 0 where none is given."""
        return bool(self.options.get("rank", 0) == rank)

    @property
    def collective(self) -> str | None:
        """The collective that it is for."""
        return next((name for name in COLLECTIVES if name in self.options), None)


def parse_faults(text: str) -> list[Fault]:
    """The faults that a text names.

    Raises:
        ValueError: it is malformed; says where, and what would be right.
    """
    return [_fault(part.strip()) for part in text.split(";") if part.strip()]


def _fault(text: str) -> Fault:
    name, _, rest = text.partition("@")
    kind = KINDS.get(name.strip())
    if kind is None:
        raise _wrong(text, f"there is no kind {name.strip()!r}; use one of {', '.join(KINDS)}")
    options: dict[str, Any] = {}
    for pair in filter(None, (word.strip() for word in rest.split(","))):
        key, equals, value = (word.strip() for word in pair.partition("="))
        if key not in kind.keys:
            raise _wrong(text, f"{name} takes no {key!r}; use {', '.join(kind.keys)}")
        if key in options:
            raise _wrong(text, f"{key} is given twice")
        options[key] = _value(text, key, value if equals else "")
    for key in kind.needs:
        if key not in options:
            raise _wrong(text, f"{name} needs {key}; add {key}=({EXAMPLES[TYPES[key]]})")
    if kind.where == "collective" and sum(key in COLLECTIVES for key in options) != 1:
        raise _wrong(
            text, f"{name} needs one collective; add one of {', '.join(COLLECTIVES)}, as all_to_all=5s"
        )
    return Fault(name.strip(), options, text)


def _value(text: str, key: str, value: str) -> Any:
    kind = TYPES[key]
    found: Any = None
    if kind == "number" and re.fullmatch(r"\d+", value):
        found = int(value)
    elif kind == "factor" and re.fullmatch(r"-?\d+(\.\d+)?", value):
        found = float(value)
    elif kind == "time" and (parts := re.fullmatch(r"(-?\d+(?:\.\d+)?)(ms|s|m|h|d)", value)):
        found = float(parts[1]) * UNITS[parts[2]]
    elif value in {"phase": PHASES, "part": ("loss", "gradient"), "text": (value,)}.get(kind, ()):
        found = value or None
    if found is None:
        raise _wrong(text, f"{key}={value!r} is not understood; use {EXAMPLES[kind]}")
    return found


def _wrong(text: str, problem: str) -> ValueError:
    return ValueError(f"TRACE_DIST_FAULTS: {text!r}: {problem}")
