"""The union of two banks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from trace_dist.bank.bank import DeltaBank
from trace_dist.bank.facts import check_dtype, dtype_of, kind_of
from trace_dist.bank.index import Index, Member, Record
from trace_dist.bank.signature import check_comparable
from trace_dist.bank.writer import Writer, copy, hand_over, read_index
from trace_dist.models.fingerprint import fuller, same_model
from trace_dist.run_folder import DELTA, SIGNATURE, BankFolder
from trace_dist.utils.files import atomic_folder, check_apart, corrupt, readable
from trace_dist.utils.names import BASE


def merge(left: DeltaBank, right: DeltaBank, out: Path | str) -> DeltaBank:
    """A new bank with the tasks of two banks of one base model, in order; their files are copied as they are.

    A task (or the signature of the base model) that is in both with the same bytes is kept once, with all that either has of it.

    Args:
        left: its tasks come first; an old bank is read as it is.
        right: the other one.
        out: folder of the new bank; it must not exist, or be empty. It is there whole or not at all.

    Raises:
        ValueError: the banks are of different base models, layers or likelihoods, a name stands for two tasks, a file is
            damaged, the folder holds something, or a bank is changed meanwhile and a task is no longer there.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out={str(out)!r}: holds something already; choose a new folder")
    if out.resolve() == Path.cwd():
        raise ValueError(f"out={str(out)!r}: is the folder of this command; choose a new folder")
    check_apart(out, {"one of the banks": left.folder, "the other bank": right.folder})
    added = _check(left, right)
    if out.exists():
        out.rmdir()
    with atomic_folder(out) as temporary, _unchanged(left, right):
        base = fuller(left.base, right.base)
        empty = Index(base, left.layer, pooling=left.pooling)
        writer = Writer(BankFolder(temporary), empty)
        records: list[Record] = []
        for bank, wanted in ((left, left.index.records), (right, added)):
            for record in wanted:
                folder = replace(empty, records=tuple(records)).folder_for(record.name)
                records.append(_copied(writer, bank, record, folder, right))
        writer.commit(replace(empty, records=tuple(records)))
    return DeltaBank(out)


@contextmanager
def _unchanged(*banks: DeltaBank) -> Iterator[None]:
    """Say of what is missed in the block that a bank was changed meanwhile, where one was. What is read takes no lock."""
    try:
        yield
    except ValueError:
        for bank in banks:
            now = read_index(bank.files)
            if now != bank.index:
                raise ValueError(
                    f"{bank.folder}: the bank was changed since it was opened (generation {bank.generation}, now "
                    f"{now.generation}), and not all of it is there as it was; merge again"
                ) from None
        raise


def _check(left: DeltaBank, right: DeltaBank) -> tuple[Record, ...]:
    """What the right bank adds. Raises ValueError where the two do not go together."""
    views = [(bank.layer, bank.pooling) for bank in (left, right)]
    if not same_model(left.base, right.base) or views[0] != views[1]:
        raise ValueError(
            f"bank {right.folder}: of the base model {right.base[:12]} and layer {right.layer}, {right.pooling}, but "
            f"{left.folder} is of {left.base[:12]} and layer {left.layer}, {left.pooling}; merge banks of one base model that "
            "represent prompts alike"
        )
    for record in left.index.records[:1]:
        for other in right.index.records[:1]:
            check_comparable(kind_of(right.facts(other.name)), kind_of(left.facts(record.name)))
    facts = [left.facts(name) for name in left.tasks]
    for name in right.tasks:
        dtype = dtype_of(right.facts(name))
        check_dtype(dtype, facts, f"task={name!r}: holds {dtype}", left.folder)
    both = [name for name in right.tasks if name in left.tasks]
    for name in both:
        if not _same(left, right, name):
            cure = (
                "remove one of the two"
                if name == BASE
                else f"rename it in one of them (bank rename {right.folder} ...)"
            )
            raise ValueError(f"task={name!r}: in {left.folder} and another one in {right.folder}; {cure}")
    return tuple(record for record in right.index.records if record.name not in both)


def _same(left: DeltaBank, right: DeltaBank, name: str) -> bool:
    """Whether two banks hold the very same task."""
    if not left.signature(name).same(right.signature(name)):
        return False
    if name == BASE:
        return True
    return _written(left, name) == _written(right, name) and left.recipe(name) == right.recipe(name)


def _written(bank: DeltaBank, name: str) -> Member:
    """A task's delta as it was written, whatever became of it; an old bank does not know. Raises ValueError as ``readable``."""
    record = bank.index.get(name)
    if record is not None and DELTA in record.files:
        return record.files[DELTA]
    with readable(bank.path(name), "delta"):
        return Member.of(bank.path(name))


def _copied(writer: Writer, bank: DeltaBank, record: Record, folder: str, other: DeltaBank) -> Record:
    """A task in the new bank, with what the other bank alone keeps of it, such as prompts.

    Raises:
        ValueError: a file is not as it was written.
    """
    new = Record(record.name, folder, facts=bank.facts(record.name))
    twin = other.index.get(record.name) or record
    sources = {file: (bank.files.task(record.folder) / file, member) for file, member in record.files.items()}
    added = {
        file: (other.files.task(twin.folder) / file, member)
        for file, member in twin.files.items()
        if file not in {SIGNATURE, DELTA, *sources}
    }

    def fill(path: Path) -> None:
        hand_over(bank.files, record, path, copy)
        for file, (source, _) in added.items():
            copy(source, path / file)

    staged = writer.stage(new, fill)
    for file, (source, member) in (sources | added).items():
        if staged.files[file] != member:
            raise corrupt(source, file.split(".")[0], "its bytes have changed")
    writer.publish(staged)
    return staged
