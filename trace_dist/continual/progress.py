"""What a method has finished of a stream, kept until its result is written, so that a run that was cut goes on from there.

    progress/<method>/progress.json        finished tasks, their scores, facts and rates, and the state that belongs to them
    progress/<method>/trained/<task>.json  what the training of a task measured
    progress/<method>/state-00002/         the method's state after two tasks

[Note: order of writes] A state appears under its final name when it is whole; then ``progress.json``, which names it, is
replaced; then the older state goes. So a process can die between any two writes: ``progress.json`` names a state that is whole,
or there is none. What lies beside it without being named is replaced when its task is learned once more.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from trace_dist.continual.judge import Row
from trace_dist.data.tasks import Task
from trace_dist.models.fingerprint import same_model
from trace_dist.train.loop import TrainResult
from trace_dist.train.workbench import Stream
from trace_dist.utils import dist
from trace_dist.utils.files import flush_folder, reading, sha256
from trace_dist.utils.names import check_task_name
from trace_dist.utils.sealed import read_record, write_record
from trace_dist.utils.together import on_main

VERSION = 1
LONGEST_NAME = 255
"""Bytes that the name of a file may have."""


@dataclass(frozen=True)
class Record:
    """What ``progress.json`` says.

    Attributes:
        tasks: names of the finished tasks, in order.
        rows: scores of the base, then after each finished task; empty before the base was scored.
        rates: task -> peak learning rate that it was trained with.
        facts: the method's facts after the last finished task.
        state: folder of the method's state; None iff no task is finished.
        files: SHA-256 of each file of the state.
    """

    tasks: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    rates: dict[str, float | None] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    state: str | None = None
    files: dict[str, str] = field(default_factory=dict)


class Progress:
    """The finished tasks of one method: ``record`` is equal on every rank, rank 0 writes. Collective throughout.

    Args:
        folder: where it is kept; what was finished there before is read.
        about: what the tasks are learned with, JSON-ready.

    Raises:
        ValueError: what lies there is damaged, or its tasks were learned with something else.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder, self._about = folder, json.loads(json.dumps(about))
        self.record = on_main(self._read)

    def _read(self) -> Record:
        path = self.folder / "progress.json"
        if not path.is_file():
            return Record()
        found = read_record(path, f"delete {self.folder} to begin anew")
        if found.get("version") != VERSION:
            raise ValueError(f"{path}: damaged, or of another version; delete {self.folder} to begin anew")
        with reading(path, "progress"):
            about, record = dict(found["about"]), _record(found["record"])
        models = [str(each.get("model")) for each in (about, self._about)]
        if "model" in about and "model" in self._about and same_model(*models):
            about["model"] = self._about["model"]
        for key, value in self._about.items():
            if about.get(key) != value and record.tasks:
                raise ValueError(
                    f"{path}: its tasks were learned with {key}={about.get(key)!r}, not {value!r}; "
                    f"set it back, choose another run_dir, or delete {self.folder} to begin anew"
                )
        return record if about == self._about else Record()

    def begin(self, base: Row) -> None:
        """Keep the scores of the base."""
        self._write(replace(self.record, rows=[base]))

    def finish(
        self, task: str, row: Row, rate: float | None, facts: dict[str, Any], state: Callable[[Path], None]
    ) -> None:
        """Keep a task that was learned, beside what ``keep_trained`` kept of it.

        Args:
            task: its name.
            row: scores after it.
            rate: peak learning rate of its training; None where there was none.
            facts: the method's.
            state: writes the method's state into an empty folder.
        """
        record = self.record
        # Examples are compared where all tasks are learned.
        before = [replace(each, per_example={}) for each in record.rows]
        final = self.folder / f"state-{len(record.tasks) + 1:05d}"
        partial = final.with_name(f".{final.name}.partial")
        on_main(lambda: _make_empty(partial))
        state(partial)
        dist.barrier()
        files = on_main(lambda: _announce(partial, final))
        tasks, rows, rates = [*record.tasks, task], [*before, row], {**record.rates, task: rate}
        self._write(Record(tasks, rows, rates, facts, final.name, files))
        if dist.is_main():
            for old in self.folder.glob("state-*"):
                if old != final:
                    # Over NFS a file that is still open stays; it goes after the next task.
                    shutil.rmtree(old, ignore_errors=True)
        dist.barrier()

    def _write(self, record: Record) -> None:
        value: dict[str, Any] = {"format": "trace_dist.progress", "version": VERSION, "about": self._about}
        value["record"] = asdict(record)
        on_main(lambda: write_record(self.folder / "progress.json", value))
        self.record = record

    @property
    def state(self) -> Path:
        """The state after the last finished task.

        Raises:
            ValueError: a file of it is missing or damaged.
        """
        if self.record.state is None:
            raise AssertionError("no task is finished, so there is no state")
        folder = self.folder / self.record.state
        on_main(lambda: _check(folder, self.record.files))
        return folder

    def trained(self) -> list[TrainResult]:
        """What the training of the finished tasks measured."""
        return [kept_trained(self.folder, task) or TrainResult() for task in self.record.tasks]


def _record(value: Mapping[str, Any]) -> Record:
    """A record out of JSON; raises one of ``MALFORMED`` where it is none."""
    record = Record(**value)
    for task in record.tasks:
        check_task_name(task)
    names = [*record.files, *([] if record.state is None else [record.state])]
    for name in names:
        if Path(name).name != name or len(name.encode()) > LONGEST_NAME:
            raise ValueError(f"{name!r:.100} is not the name of a file")
    if (record.state is None) != (not record.tasks):
        raise ValueError("its state is not that of its tasks")
    rates, files, facts = dict(record.rates), dict(record.files), dict(record.facts)
    rows = [Row(**row) for row in record.rows]  # type: ignore[arg-type]
    return replace(record, tasks=list(record.tasks), rows=rows, rates=rates, facts=facts, files=files)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _announce(partial: Path, final: Path) -> dict[str, str]:
    """Give a whole state its name; SHA-256 of its files."""
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    flush_folder(final.parent)
    return {file.name: sha256(file) for file in sorted(final.iterdir())}


def _check(folder: Path, files: dict[str, str]) -> None:
    for name, digest in files.items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise ValueError(f"{folder / name}: missing or damaged; delete {folder.parent} to begin anew")


def keep_trained(folder: Path, task: str, result: TrainResult) -> None:
    """Keep what the training of a task measured. Collective."""
    on_main(lambda: write_record(folder / "trained" / f"{task}.json", result.to_json()))


def kept_trained(folder: Path, task: str) -> TrainResult | None:
    """What ``keep_trained`` kept of a task; None if there is nothing."""
    path = folder / "trained" / f"{task}.json"
    if not path.is_file():
        return None
    found = read_record(path, "delete it; what it measured is then left out", bare=True)
    with reading(path, "measurements"):
        return TrainResult.from_json(found)


def examples_digest(streams: Sequence[Stream]) -> str:
    """SHA-256 of tasks' examples, in order."""
    return digest_of([stream.task for stream in streams])


def digest_of(tasks: Sequence[Task]) -> str:
    """``examples_digest`` of tasks that are not tokenised."""
    digest = hashlib.sha256()
    for task in tasks:
        for part in task.parts:
            digest.update(
                json.dumps([task.name, *(part[column][:] for column in part.column_names)]).encode()
            )
    return digest.hexdigest()
