"""Changes of a bank: whole or not at all, by one writer at a time, and unseen by readers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bank.crash import dies_at
from bank.samples import drawn, same_delta, small_delta, write_old_bank

from trace_dist import DeltaBank
from trace_dist.bank import merge as merging
from trace_dist.bank.bank import BASE
from trace_dist.bank.folder import read_task
from trace_dist.bank.merge import merge
from trace_dist.bank.sketch import sketch_update
from trace_dist.bank.verify import verify
from trace_dist.bank.writer import locked
from trace_dist.launching import followed
from trace_dist.run_folder import BankFolder

TASKS = ("one", "two")
Change = Callable[[DeltaBank], None]


def add(bank: DeltaBank, task: str, seed: int) -> None:
    sketch = sketch_update({"w": torch.full((3, 3), float(seed))}, 0, "proxy")
    bank.add(drawn(task, seed), small_delta(task, seed), sketch, {"lr": 1e-3, "steps": seed})


def fill(folder: Path) -> DeltaBank:
    bank = DeltaBank.create(folder, "aaaa", layer=1)
    bank.add(drawn(BASE, 0), None)
    for seed, task in enumerate(TASKS, start=1):
        add(bank, task, seed)
    return bank


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, but a lock that was left by a process that died, and how often the bank has been changed."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith((".lock", ".generation"))
    }


CHANGES: dict[str, Change] = {
    "add": lambda bank: add(bank, "three", 3),
    "remove": lambda bank: bank.remove("one"),
    "rename": lambda bank: bank.rename("one", "Three 1"),
}


@pytest.mark.parametrize("old", [False, True], ids=["present", "old"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_cut_at_any_moment_leaves_the_bank_as_it_was_before_or_after(
    change: str, old: bool, tmp_path: Path
) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    if old:
        pairs = [(drawn(task, seed), small_delta(task, seed)) for seed, task in enumerate(TASKS, start=1)]
        write_old_bank(before, [(drawn(BASE, 0), None), *pairs])
    else:
        fill(before)
    shutil.copytree(before, after)
    CHANGES[change](DeltaBank(after))
    names = {"before": DeltaBank(before).tasks, "after": DeltaBank(after).tasks}
    step, seen = 0, set()
    while True:
        bank = tmp_path / f"cut{step}"
        shutil.copytree(before, bank)
        if not dies_at(step, lambda bank=bank: CHANGES[change](DeltaBank(bank))):
            break
        found = DeltaBank(bank)
        assert verify(found) == []
        assert found.tasks in names.values()
        seen.add(tuple(found.tasks))
        for task in found.tasks:
            origin = "one" if task.startswith("Three") else task
            seed = [BASE, "one", "two", "three"].index(origin)
            assert same_delta(found.delta(task), small_delta(task, seed) if seed else None)
        if found.tasks == names["before"]:
            CHANGES[change](found)
        else:
            # any writer clears up what was left
            found.add(drawn("late", 9), small_delta("late", 9))
            found.remove("late")
        same = contents(bank)
        wanted = contents(after)
        same.pop("bank.json")
        wanted.pop("bank.json")
        assert same == wanted
        shutil.rmtree(bank)
        step += 1
    assert seen == {tuple(tasks) for tasks in names.values()}
    assert step > 5
    assert contents(bank) == contents(after)


def test_an_index_put_back_from_a_copy_loses_no_task(tmp_path: Path) -> None:
    """What it does not name is no leaving of a change that was cut, and nobody sweeps it away."""
    bank = fill(tmp_path)
    copy = bank.files.index.read_bytes()
    add(bank, "three", 3)
    whole = contents(tmp_path)
    bank.files.index.write_bytes(copy)
    old = DeltaBank(tmp_path)
    said = r"generation 3, but the bank has had generation 4; restore the whole folder.*, or delete .*\.generation to lose"
    (problem,) = verify(old)
    assert re.search(said, problem)
    for change in (lambda: add(old, "four", 4), lambda: old.remove("none"), lambda: old.rename("one", "two")):
        with pytest.raises(ValueError, match=said):
            change()
    bank.files.index.write_bytes(whole["bank.json"])
    assert contents(tmp_path) == whole
    assert DeltaBank(tmp_path).tasks == [BASE, *TASKS, "three"]
    # Who wants the old index says so.
    bank.files.index.write_bytes(copy)
    bank.files.newest.unlink()
    DeltaBank(tmp_path).remove("one")
    assert sorted(path.name for path in bank.files.tasks.iterdir()) == ["base", "two"]


def test_a_merge_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    left, right, out = fill(tmp_path / "left"), tmp_path / "right", tmp_path / "out"
    add(DeltaBank.create(right, "aaaa", layer=1), "three", 3)
    step = 0
    while dies_at(step, lambda: merge(left, DeltaBank(right), out) and None):
        if out.exists():
            assert verify(DeltaBank(out)) == []
            shutil.rmtree(out)
        step += 1
    assert step > 5
    assert DeltaBank(out).tasks == [BASE, "one", "two", "three"]
    assert contents(left.folder) == contents(fill(tmp_path / "left").folder)


def test_a_bank_that_was_deleted_but_for_hidden_files_is_started_again(tmp_path: Path) -> None:
    bank = fill(tmp_path)
    bank.files.index.unlink()
    shutil.rmtree(bank.files.tasks)
    assert bank.files.newest.read_text() == "3\n"
    assert fill(tmp_path).tasks == [BASE, *TASKS]


def test_a_bank_is_started_whole_or_not_at_all(tmp_path: Path) -> None:
    def start() -> None:
        DeltaBank.create(folder, "aaaa", layer=1).add(drawn(BASE, 0), None)

    step, folder = 0, tmp_path / "bank"
    while dies_at(step, start):
        start()
        assert DeltaBank(folder).tasks == [BASE]
        assert verify(DeltaBank(folder)) == []
        shutil.rmtree(folder)
        step += 1
    assert step > 10


def test_work_done_again_gives_the_same_bytes_and_changes_nothing(tmp_path: Path) -> None:
    fill(tmp_path / "a")
    fill(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert fill(tmp_path / "a").generation == 3
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [".generation", "bank.json", "tasks"]


def test_a_change_leaves_the_files_of_other_tasks_alone(tmp_path: Path) -> None:
    bank = fill(tmp_path)
    stats = {path: path.stat() for path in (tmp_path / "tasks").rglob("*.safetensors")}
    CHANGES["add"](bank)
    bank.rename("one", "uno")
    bank.remove("three")
    assert bank.tasks == [BASE, "uno", "two"]
    assert bank.generation == 6
    for path, stat in stats.items():
        assert (path.stat().st_mtime_ns, path.stat().st_ino) == (stat.st_mtime_ns, stat.st_ino)
    assert same_delta(bank.delta("uno"), small_delta("one", 1))
    assert bank.delta("uno").task == bank.signature("uno").task == "uno"  # type: ignore[union-attr]
    add(bank, "one", 5)
    assert verify(DeltaBank(tmp_path)) == []
    assert same_delta(bank.delta("uno"), small_delta("one", 1))
    assert same_delta(bank.delta("one"), small_delta("one", 5))


def test_refused_changes_leave_nothing(tmp_path: Path) -> None:
    bank = fill(tmp_path)
    before = contents(tmp_path)
    for change, words in (
        (lambda: bank.add(drawn("one", 1), small_delta("one", 2)), "already, with another delta; rename or"),
        (lambda: bank.add(drawn("one", 2), small_delta("one", 1)), "with another signature; rename or"),
        (lambda: bank.add(drawn("Base", 4), small_delta("Base", 4)), "task='Base': is reserved"),
        (lambda: bank.add(drawn(BASE, 4), small_delta(BASE, 4)), "task='base': is reserved"),
        (lambda: bank.add(drawn("three", 4), None), "without a delta"),
        (lambda: bank.add(drawn("../x", 4), small_delta("../x", 4)), "must not hold '/'"),
        (lambda: bank.add(drawn("three", 4, dim=9), small_delta("three", 4)), "hidden size 9, must be 8"),
        (lambda: bank.add(drawn("three", 4), small_delta("three", 4), None, {"lr": object()}), "facts: "),
        (lambda: bank.add(drawn("three", 4), small_delta("three", 4), None, {"x": "a" * 70_000}), "at most"),
        (lambda: bank.add(drawn("three", 4), small_delta("three", 4, model="b")), "made for model b"),
        (lambda: bank.remove("three"), "task='three': not in the bank .*; it holds base, one, two"),
        (lambda: bank.rename("three", "four"), "not in the bank"),
        (lambda: bank.rename("one", "two"), "already"),
        (lambda: bank.rename("one", "base"), "is reserved"),
        (lambda: bank.rename("one", "../one"), "must not hold"),
        (lambda: bank.rename(BASE, "one more"), "keeps its name"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            change()
        assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before


def test_a_second_writer_is_told_who_writes(tmp_path: Path) -> None:
    bank = fill(tmp_path)
    with locked(BankFolder(tmp_path)):
        with pytest.raises(ValueError, match=f"process {os.getpid()} on .* is at work in it; wait until"):
            bank.remove("one")
        assert DeltaBank(tmp_path).tasks == [BASE, *TASKS]
        assert bank.delta("one") is not None
    bank.remove("one")


HOLDER = """
import sys
from pathlib import Path
from trace_dist.utils.locks import hold
with hold(Path(sys.argv[1]), "bank"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_bank_that_a_command_fills_is_changed_by_its_stages_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = fill(tmp_path)
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(BankFolder(tmp_path).command_lock)], **pipes
    )
    try:
        assert command.stdout.readline() == "held\n"
        for change in (lambda: bank.remove("one"), lambda: CHANGES["add"](bank)):
            with pytest.raises(ValueError, match=f"process {command.pid} on .* is at work in it; wait until"):
                change()
        assert DeltaBank(tmp_path).tasks == [BASE, *TASKS]
        for name, value in followed(command.pid).items():
            monkeypatch.setenv(name, value)
        bank.remove("one")
    finally:
        command.communicate("\n", timeout=60)
    assert not BankFolder(tmp_path).command_lock.exists()


def test_a_bank_that_is_changed_while_it_is_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is added meanwhile is left to the next merge; what is taken away is missed by name, and nothing is left behind."""
    left, right = fill(tmp_path / "left"), DeltaBank.create(tmp_path / "right", "aaaa", layer=1)
    add(right, "three", 3)
    opened = DeltaBank(tmp_path / "left")
    CHANGES["add"](left)
    assert merge(opened, right, tmp_path / "earlier").tasks == [BASE, *TASKS, "three"]
    opened, check = DeltaBank(tmp_path / "left"), merging._check

    def removed_after_the_check(*banks: DeltaBank) -> Any:
        found = check(*banks)
        left.remove("two")
        return found

    monkeypatch.setattr(merging, "_check", removed_after_the_check)
    with pytest.raises(ValueError, match=r"left: the bank was changed since .* merge again"):
        merge(opened, right, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_processes_that_write_and_one_that_reads(tmp_path: Path) -> None:
    reader = fill(tmp_path)

    def write(first: int) -> None:
        for seed in range(first, first + 6):
            while True:
                try:
                    add(DeltaBank(tmp_path), f"task{seed}", seed)
                    break
                except ValueError as error:
                    if "is at work in it" not in str(error):
                        raise

    writers = []
    for first in (10, 20):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                write(first)
                code = 0
            finally:
                os._exit(code)
        writers.append(child)
    codes: dict[int, int] = {}
    while len(codes) < 2:
        for task, seed in (("one", 1), ("two", 2)):
            assert same_delta(reader.delta(task), small_delta(task, seed))
            assert same_delta(DeltaBank(tmp_path).delta(task), small_delta(task, seed))
        for child in set(writers) - codes.keys():
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                codes[child] = os.waitstatus_to_exitcode(status)
    assert set(codes.values()) == {0}
    assert reader.tasks == [BASE, *TASKS]
    assert len(reader.retriever.tasks) == 3
    reader.reload()
    assert set(reader.tasks) == {BASE, *TASKS, *(f"task{s}" for s in (*range(10, 16), *range(20, 26)))}
    assert reader.generation == 15
    assert reader.retriever.tasks == reader.tasks
    assert verify(reader) == []


def test_a_reader_and_a_task_that_was_taken_away_or_replaced(tmp_path: Path) -> None:
    reader = fill(tmp_path)
    writer = DeltaBank(tmp_path)
    writer.rename("two", "deux")
    assert same_delta(reader.delta("two"), small_delta("two", 2))
    writer.remove("one")
    with pytest.raises(ValueError, match=r"was changed since it was opened .*'one' is not there as it was"):
        reader.delta("one")
    add(writer, "one", 7)
    for read in (reader.delta, reader.signature, reader.sketch, reader.mask):
        with pytest.raises(ValueError, match="open the bank again"):
            read("one")
    reader.reload()
    assert same_delta(reader.delta("one"), small_delta("one", 7))
    assert reader.retriever.tasks == [BASE, "deux", "one"]


def test_a_task_whose_place_is_taken_gets_another(tmp_path: Path) -> None:
    """A task's files were moved to another disk and a link left in their place; the link outlived the task, and kept its name."""
    bank, moved = fill(tmp_path / "bank"), tmp_path / "elsewhere"
    shutil.move(bank.path("one").parent, moved)
    bank.path("one").parent.symlink_to(moved)
    assert verify(bank) == []
    bank.remove("one")
    assert not bank.files.task("one").is_symlink()
    assert len(list(moved.iterdir())) == 3
    bank.files.task("one").write_text("what cannot be deleted")
    add(bank, "one", 5)
    assert same_delta(DeltaBank(bank.folder).delta("one"), small_delta("one", 5))
    assert verify(bank) == []


def test_a_bank_that_is_changed_while_it_is_verified(tmp_path: Path) -> None:
    """What was taken away meanwhile is not missed."""
    opened = fill(tmp_path)
    DeltaBank(tmp_path).remove("one")
    assert verify(opened) == []
    opened.path("two").unlink()
    add(DeltaBank(tmp_path), "three", 3)
    assert len(verify(opened)) == 1


@pytest.mark.parametrize("way", ["plain", "dots", "link", "linked files"])
def test_a_task_keeps_its_name_and_facts_however_its_folder_is_named(way: str, tmp_path: Path) -> None:
    bank = fill(tmp_path / "bank")
    bank.rename("one", "first")
    folder = bank.path("first").parent
    if way == "dots":
        folder = folder.parent / "two" / ".." / folder.name
    elif way == "link":
        (tmp_path / "link").symlink_to(folder)
        folder = tmp_path / "link"
    elif way == "linked files":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    task = read_task(folder, bank)
    assert (task.signature.task, task.facts) == ("first", {"lr": 1e-3, "steps": 1})


def test_a_name_that_nobody_can_ask_for(tmp_path: Path) -> None:
    bank = fill(tmp_path)
    rule = "task='auto': stands for the task that each prompt retrieves; rename the task"
    with pytest.raises(ValueError, match=rule):
        add(bank, "auto", 3)
    with pytest.raises(ValueError, match=rule):
        bank.rename("one", "auto")
    # As an earlier release left it.
    index = bank.index
    records = tuple(replace(each, name=each.name.replace("one", "auto")) for each in index.records)
    replace(index, records=records).save(bank.files.index)
    bank = DeltaBank(tmp_path)
    assert bank.tasks == [BASE, "auto", "two"]
    assert verify(bank) == []
    bank.rename("auto", "one")
    assert bank.tasks == [BASE, *TASKS]


def test_an_index_that_was_lost_is_no_reason_to_start_anew(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "bank.json").unlink()
    with pytest.raises(ValueError, match=r"tasks is there but bank\.json is missing; restore it"):
        DeltaBank.create(tmp_path, "aaaa", layer=1)
    assert (tmp_path / "tasks" / "one" / "delta.safetensors").is_file()
