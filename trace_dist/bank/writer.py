"""Changes of a bank: one writer at a time, and a cut at any moment leaves the bank as it was before or after.

[Note: changes] New files are written and flushed in a folder with a temporary name, which is renamed; then the index is
replaced, and with that the change is there. What a change leaves behind (files of a task that was removed, or of a change
that was cut) is no longer, or not yet, in the index: whoever writes next deletes it. A file is never changed in place.

[Note: older] Beside an index that was put back from a copy lie tasks that it does not know, and that are no leavings. So the
newest generation is kept in a file of its own, and nobody writes while the index is older.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from trace_dist.bank import legacy
from trace_dist.bank.delta import Delta
from trace_dist.bank.facts import describe
from trace_dist.bank.index import Index, Member, Record
from trace_dist.launching import run_holders
from trace_dist.run_folder import DELTA, SIGNATURE, BankFolder
from trace_dist.utils.files import check_readable, flush_folder, write_text, writing
from trace_dist.utils.locks import Held, hold, hold_or_share
from trace_dist.utils.names import BASE


def read_index(files: BankFolder) -> Index:
    """The present index of a bank, of any version that this release reads.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    index = Index.load(files.index)
    return legacy.with_tasks(index, files) if index.version == 1 else index


def check_newest(files: BankFolder, index: Index) -> None:
    """Raise ValueError where the index is older than what lies beside it ([Note: older])."""
    try:
        newest = int(files.newest.read_text())
    # A bank that no change has been made to since there is such a file, or a damaged one, which the next change replaces.
    except (OSError, ValueError):
        return
    if index.generation < newest:
        raise ValueError(
            f"{files.index}: is of generation {index.generation}, but the bank has had generation {newest}; restore the whole "
            f"folder from one copy, or delete {files.newest} to lose the tasks that this index does not name"
        )


class Writer:
    """Holds a bank for writing; made by ``writing_to``.

    Attributes:
        files: the bank's folder.
        index: as it is on disk now.
    """

    def __init__(self, files: BankFolder, index: Index) -> None:
        self.files, self.index = files, index

    def upgrade(self) -> None:
        """Bring an old bank into the present layout; the deltas' files keep their bytes."""
        if self.index.version == 1:
            self.commit(self.index)

    def commit(self, index: Index) -> None:
        """Replace the index by one with the records of ``index``."""
        records: list[Record] = []
        for record in index.records:
            if not record.folder:
                record = self._move_old(record, index.changed(records))
            records.append(record)
        index = index.changed(records)
        index.save(self.files.index)
        with suppress(ValueError):  # the change is there; an older number guards less
            write_text(self.files.newest, f"{index.generation}\n")
        self.index = index
        self.sweep()

    def folder_for(self, name: str) -> str:
        """As ``Index.folder_for``; what could not be deleted, and what somebody has put there, keeps its place."""
        return self.index.folder_for(name, [path.name for path in self.files.tasks.glob("*")])

    def stage(self, record: Record, fill: Callable[[Path], None]) -> Record:
        """Write a task's files into a temporary folder.

        Args:
            record: the task, with the name of its folder.
            fill: writes them into the folder that it is given.

        Returns:
            The record with its files.
        """
        folder = self.temporary(record)
        with writing(self.files.root):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            try:
                fill(folder)
            except BaseException:
                self.discard(record)
                raise
            flush_folder(folder)
            members = {path.name: Member.of(path) for path in sorted(folder.iterdir())}
        return replace(record, files=members)

    def discard(self, record: Record) -> None:
        """Delete what was staged."""
        shutil.rmtree(self.temporary(record), ignore_errors=True)

    def publish(self, record: Record) -> None:
        """Give a task's folder its name; ``commit`` makes it part of the bank."""
        with writing(self.files.root):
            self.temporary(record).rename(self.files.task(record.folder))
            flush_folder(self.files.tasks)

    def temporary(self, record: Record) -> Path:
        """Where a task is staged."""
        return self.files.tasks / f".{record.folder}.tmp"

    def _move_old(self, record: Record, before: Index) -> Record:
        """Make the folder of a task of version 1. Its delta gets a second name; the first one goes with the old layout."""
        delta = None if record.name == BASE else Delta.load(self.files.old_delta(record.name))
        facts = describe(delta, legacy.signature(self.files, record.name))
        new = replace(record, folder=before.folder_for(record.name), facts=facts)
        staged = self.stage(new, lambda folder: hand_over(self.files, record, folder, link))
        self.publish(staged)
        return staged

    def sweep(self) -> None:
        """Delete what is not in the index ([Note: changes]); what cannot be deleted now is left to the next writer."""
        if self.index.version != 1:
            shutil.rmtree(self.files.old_deltas, ignore_errors=True)
            with suppress(OSError):
                self.files.old_signatures.unlink(missing_ok=True)
        elif not self.files.old_signatures.is_file():
            # an index that was put back by hand: the folders may be all that is left of the tasks
            return
        kept = {record.folder for record in self.index.records}
        for path in self.files.tasks.glob("*"):
            if path.name in kept:
                continue
            if path.is_symlink():
                # Of a task that somebody has moved to another disk, whose files are theirs.
                with suppress(OSError):
                    path.unlink()
            else:
                shutil.rmtree(path, ignore_errors=True)
        for file in (self.files.index, self.files.newest):
            for path in self.files.root.glob(f".{file.name}.*.tmp"):
                with suppress(OSError):
                    path.unlink()


def hand_over(source: BankFolder, record: Record, folder: Path, place: Callable[[Path, Path], None]) -> None:
    """Put the files of a task into a folder.

    Args:
        source: the bank that holds the task, of any version.
        record: the task.
        folder: where its files go.
        place: ``copy`` or ``link``.
    """
    for file in record.files:
        place(source.task(record.folder) / file, folder / file)
    if not record.folder:
        legacy.signature(source, record.name).save(folder / SIGNATURE)
        if record.name != BASE:
            place(source.old_delta(record.name), folder / DELTA)


def copy(source: Path, target: Path) -> None:
    """Copy a file and flush it. Raises ValueError where it is missing or cannot be read."""
    if not source.is_file():
        raise ValueError(f"{source}: no such file; restore it from a copy")
    check_readable(source, source.stem)
    shutil.copyfile(source, target)
    with target.open("rb") as handle:
        os.fsync(handle.fileno())


def link(source: Path, target: Path) -> None:
    """Give a file a second name, or make a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        copy(source, target)


@contextmanager
def writing_to(files: BankFolder) -> Iterator[Writer]:
    """Hold a bank for writing while the block runs.

    Raises:
        ValueError: another process writes, there is no bank, its index is older than its files, its tasks are those of another
            bank, or it cannot be written.
    """
    read_index(files)
    check_own(files)
    with locked(files):
        writer = Writer(files, read_index(files))
        check_newest(files, writer.index)
        writer.sweep()
        yield writer


def check_own(files: BankFolder) -> None:
    """Raise ValueError where the tasks are a link into another bank: each would delete what the other's index does not name."""
    root, tasks = (Path(os.path.realpath(path)) for path in (files.root, files.tasks))
    other = BankFolder(tasks.parent)
    if other.root != root and other.index.is_file():
        raise ValueError(
            f"bank {files.root}: its tasks are a link to those of the bank {other.root}; change that one, or copy the whole "
            "folder"
        )


@contextmanager
def locked(files: BankFolder) -> Iterator[None]:
    """Keep other writers out of a bank while the block runs; a stage may write into the bank that its command holds.

    Raises:
        ValueError: another process writes the bank, or learns into it.
    """
    what = f"bank {files.root}"
    with ExitStack() as stack:
        try:
            stack.enter_context(hold_or_share(files.command_lock, what, run_holders()))
            stack.enter_context(hold(files.lock, what))
        except Held as held:
            raise ValueError(
                f"{what}: {held.holder} is at work in it; wait until it is done, or end it"
            ) from None
        yield
