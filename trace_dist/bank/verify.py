"""Is everything in a bank as it was written?"""

from __future__ import annotations

from contextlib import suppress

from trace_dist.bank.bank import DeltaBank
from trace_dist.bank.delta import check_base
from trace_dist.bank.index import Member, Record
from trace_dist.bank.writer import check_newest, read_index
from trace_dist.masks.mask import Mask
from trace_dist.run_folder import ADAPTED


def verify(bank: DeltaBank) -> list[str]:
    """Read every file of a bank and compare it with the index.

    Returns:
        One line for each problem; none where all is well. In a bank of version 1, whose index has no checksums, the files'
        own ones are all there is. Where the bank is changed meanwhile it is reloaded, and read again.
    """
    while problems := _problems(bank):
        before = bank.index
        with suppress(ValueError):  # what is wrong with the index is one of the problems
            bank.reload()
        if bank.index == before:
            break
    return problems


def _problems(bank: DeltaBank) -> list[str]:
    """One line for each problem of a bank as it was when it was opened."""
    problems = _older(bank)
    dims: dict[int, str] = {}
    for record in bank.index.records:
        problems += _damaged(bank, record) or _inconsistent(bank, record, dims)
    if len(dims) > 1:
        problems.append(f"{bank.folder}: signatures of {len(dims)} hidden sizes: {dims}; remove the odd ones")
    return problems


def _older(bank: DeltaBank) -> list[str]:
    """Whether the index is older than its files: the one that lies there now, not the one that the bank was opened with."""
    try:
        check_newest(bank.files, read_index(bank.files))
    except ValueError as error:
        return [str(error)]
    return []


def _damaged(bank: DeltaBank, record: Record) -> list[str]:
    """Files that are missing or have other bytes than the index says."""
    problems = []
    for file, member in record.files.items():
        path = bank.files.task(record.folder) / file
        try:
            found = Member.of(path)
        except OSError as error:
            problems.append(f"{path}: cannot be read ({error.strerror}); restore it from a copy")
            continue
        if found.num_bytes != member.num_bytes:
            problems.append(
                f"{path}: has {found.num_bytes} bytes, not {member.num_bytes}; restore it from a copy"
            )
        elif found != member:
            problems.append(f"{path}: its bytes are not those that were written; restore it from a copy")
    return problems


def _inconsistent(bank: DeltaBank, record: Record, dims: dict[int, str]) -> list[str]:
    """Files that are whole but do not belong there."""
    name = record.name
    try:
        dims.setdefault(bank.signature(name).dim, name)
        bank.sketch(name)
        bank.prompts(name)
        if ADAPTED in record.files:
            bank.adapted(name)
        delta = bank.own_delta(name)
        if delta is None:
            return []
        check_base(delta.mask, bank.base, str(bank.path(name)))
        begun = bank.begun(name)
    except ValueError as error:
        return [str(error)]
    if begun is not None and _meet(delta.mask, begun):
        return [f"{bank.path(name)}: shares entries with the tasks of its recipe; learn the task again"]
    found, known = delta.mask.num_entries, record.facts.get("entries")
    if record.folder and found != known:
        return [f"{bank.path(name)}: holds {found} entries, the index says {known}; add the task again"]
    return []


def _meet(mask: Mask, other: Mask) -> bool:
    """Whether two masks share entries."""
    return (mask | other).num_entries < mask.num_entries + other.num_entries
