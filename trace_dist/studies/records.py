"""What a study has done: one JSON record a line, appended when a piece of work has ended.

A process that is killed loses the piece that it was at. A line that was cut, or changed since (``checksum``, which earlier
releases did not write), is left out, and its work is done again. Records of other settings (another
model, other data, other steps) lie beside those of the present ones and are not read.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from trace_dist.utils.files import reading, writing
from trace_dist.utils.log import get_logger
from trace_dist.utils.sealed import json_checksum

logger = get_logger(__name__)


class Cell(NamedTuple):
    """What rates are tuned for."""

    arm: str
    task: str
    density: float | None
    """None for an arm without one."""


@dataclass(frozen=True)
class Trial:
    """One training and what it led to.

    Attributes:
        cell: arm, task and density.
        seed: of mask and order.
        lr: peak learning rate.
        validation: nats per answer token of held-out training examples; infinite where training diverged.
        losses: nats of each test example's answer; None where another rate had done better on the held-out training examples.
        right: whether each test answer's tokens are all the likeliest, as greedy decoding would give them.
        text: nats per token of general text.
        entries: that were trained.
        step_flops, step_s: of the training alone.
    """

    cell: Cell
    seed: int
    lr: float
    validation: float
    losses: list[float] | None
    right: list[bool] | None
    text: float | None
    entries: int
    train_flops: float
    train_s: float
    seconds: float


@dataclass
class Records:
    """All of a study's records.

    Attributes:
        trials: cell -> seed -> trials.
        masks: (arm, task, seed) -> what making the masks found and cost.
        bases: task -> the base model's scores.
        hardware: what trained -> how many trainings; those of records that do not say are not counted.
    """

    trials: dict[Cell, dict[int, list[Trial]]] = field(default_factory=dict)
    masks: dict[tuple[str, str, int], dict[str, Any]] = field(default_factory=dict)
    bases: dict[str, dict[str, Any]] = field(default_factory=dict)
    hardware: Counter[str] = field(default_factory=Counter)

    def add(self, record: Mapping[str, Any]) -> None:
        """Take a record up."""
        kind = record["kind"]
        if kind == "base":
            self.bases[record["task"]] = dict(record)
        elif kind == "mask":
            made = {**record, "seconds": float(record["seconds"])}
            self.masks[record["arm"], record["task"], int(record["seed"])] = made
        else:
            trial = _trial(record)
            self.trials.setdefault(trial.cell, {}).setdefault(trial.seed, []).append(trial)
            if "hardware" in record:
                self.hardware[str(record["hardware"])] += 1

    def of(self, cell: Cell, seed: int = 0) -> list[Trial]:
        """Trials of a cell and a seed."""
        return self.trials.get(cell, {}).get(seed, [])

    def best(self, cell: Cell, seed: int = 0) -> Trial | None:
        """The trial whose rate did best on held-out training examples; None where all diverged, or there is none."""
        finite = [trial for trial in self.of(cell, seed) if trial.losses is not None]
        return min(finite, key=lambda trial: trial.validation, default=None)

    @property
    def num_trials(self) -> int:
        return sum(len(trials) for seeds in self.trials.values() for trials in seeds.values())

    @property
    def seconds(self) -> float:
        """Wall time of all work, in all lives of the study."""
        trials = (
            trial.seconds for seeds in self.trials.values() for each in seeds.values() for trial in each
        )
        return sum(trials) + sum(record["seconds"] for record in self.masks.values())


def _trial(record: Mapping[str, Any]) -> Trial:
    validation, right = record["validation"], record["right"]
    losses, text, density = record["losses"], record["text"], record["density"]
    return Trial(
        Cell(str(record["arm"]), record["task"], None if density is None else float(density)),
        int(record["seed"]),
        float(record["lr"]),
        math.inf if validation is None else float(validation),
        None if losses is None else [float(each) for each in losses],
        None if right is None else [bool(each) for each in right],
        None if text is None else float(text),
        int(record["entries"]),
        float(record["train_flops"]),
        float(record["train_s"]),
        float(record["seconds"]),
    )


class Journal:
    """The file of a study's records.

    Args:
        path: the file.
        about: task -> digest of the settings that its records must share.
    """

    def __init__(self, path: Path, about: Mapping[str, str]) -> None:
        self.path, self.about = path, about

    def read(self) -> Records:
        """All records of the present settings."""
        found, others = Records(), 0
        for record in self._lines():
            if record["about"] == self.about.get(record["task"]):
                with reading(self.path, "study"):
                    found.add(record)
            else:
                others += 1
        if others:
            logger.info("%s: left out %d records of other settings", self.path, others)
        return found

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a record: in one piece, and it stays."""
        plain = json.loads(json.dumps({"about": self.about[record["task"]], **record}, allow_nan=False))
        line = json.dumps({**plain, "checksum": json_checksum(plain)}) + "\n"
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            whole = not self.path.is_file() or self.path.read_bytes()[-1:] in (b"", b"\n")
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                # A line that was cut stays a line of its own.
                os.write(handle, (line if whole else "\n" + line).encode())
                os.fsync(handle)
            finally:
                os.close(handle)

    def _lines(self) -> Iterator[dict[str, Any]]:
        if not self.path.is_file():
            return
        for number, line in enumerate(self.path.read_bytes().split(b"\n"), 1):
            if not line.strip():
                continue
            record = _whole(line)
            if record is not None:
                yield record
            else:
                logger.warning(
                    "%s:%d: is no record (it was cut or changed); it is left out", self.path, number
                )


def _whole(line: bytes) -> dict[str, Any] | None:
    """The record of a line, without its checksum; None where it is not as it was written."""
    try:
        record = json.loads(line)
    # what was cut, or is no text, or is nested too deeply
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in ("about", "task")):
        return None
    digest = record.pop("checksum", None)
    return record if digest in (None, json_checksum(record)) else None
