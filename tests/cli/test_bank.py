"""The actions of `bank`, through the command line."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from bank.samples import drawn, same_delta, small_delta

from trace_dist import DeltaBank
from trace_dist.bank.bank import BASE
from trace_dist.cli.bank_commands import ACTIONS, bank_command
from trace_dist.cli.main import main
from trace_dist.cli.parser import parse


def command(*arguments: object) -> None:
    bank_command(parse(["bank", *map(str, arguments)]).bank)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, tasks in (("bank", ("one", "two")), ("other", ("three",))):
        bank = DeltaBank.create(tmp_path / name, "aaaa", layer=1)
        bank.add(drawn(BASE, 0), None)
        for task in tasks:
            bank.add(drawn(task, len(task)), small_delta(task, len(task)))
    return tmp_path


def test_a_bank_is_kept_in_order(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank = folder / "bank"
    command("show", bank)
    shown = capsys.readouterr().out
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("│")] == [BASE, "one", "two"]
    assert "generation 3, layer 1, base model aaaa" in shown
    command("rename", bank, "one", "first")
    command("remove", bank, "two")
    command("merge", bank, folder / "other", "--out", folder / "all")
    assert DeltaBank(folder / "all").tasks == [BASE, "first", "three"]
    command("add", bank, folder / "all" / "tasks" / "three")
    assert DeltaBank(bank).tasks == [BASE, "first", "three"]
    capsys.readouterr()
    command("verify", bank)
    assert "3 signatures and their deltas are as they were written" in capsys.readouterr().out


def test_each_change_is_said_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank, other = folder / "bank", folder / "other"
    for words, said in (
        (("rename", bank, "one", "first"), "renamed one to first: the bank {} holds 2 tasks"),
        (("remove", bank, "two"), "removed two: the bank {} holds 1 task"),
        (("add", bank, other / "tasks" / "three"), "added three: the bank {} holds 2 tasks"),
        (("add", bank, other / "tasks" / "three"), "three was there already, the very same: the bank {} holds 2 tasks"),
    ):  # fmt: skip
        command(*words)
        assert capsys.readouterr().out == said.format(bank) + "\n"
    command("merge", bank, other, "--out", folder / "all")
    assert capsys.readouterr().out == f"merged {bank} and {other}: the bank {folder / 'all'} holds 2 tasks\n"


def test_a_task_is_added_under_the_name_and_with_the_facts_that_its_bank_knows(folder: Path) -> None:
    """Its files have the name that it was learned under."""
    bank, other = DeltaBank(folder / "bank"), DeltaBank(folder / "other")
    facts = {"lr": 1e-3, "steps": 7, "examples": "digest"}
    other.add(drawn("one", 5), small_delta("one", 5), facts=facts)
    source = other.path("one").parent
    with pytest.raises(ValueError, match=r"task='one': in the bank .* \(bank add --name\)"):
        command("add", bank.folder, source)
    other.rename("one", "uno")
    command("add", bank.folder, source)
    command("add", bank.folder, source, "--name", "eins")
    bank.reload()
    assert bank.tasks == [BASE, "one", "two", "uno", "eins"]
    for name in ("uno", "eins"):
        assert bank.facts(name)["training"] == facts
        assert same_delta(bank.delta(name), other.delta("uno"))
        assert bank.delta(name).task == bank.signature(name).task == name  # type: ignore[union-attr]
    # A folder that belongs to no bank: the names are those in its files.
    shutil.copytree(source, folder / "alone")
    command("add", bank.folder, folder / "alone", "--name", "solo")
    bank.reload()
    assert bank.tasks[-1] == "solo"
    assert "training" not in bank.facts("solo")


def test_a_task_that_was_renamed_here_is_the_same_task(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank, source = folder / "bank", folder / "other" / "tasks" / "three"
    command("add", bank, source)
    command("rename", bank, "three", "drei")
    command("add", bank, source, "--name", "drei")
    assert "drei was there already" in capsys.readouterr().out
    assert DeltaBank(bank).generation == 5


def test_what_cannot_be_added(folder: Path) -> None:
    deep = DeltaBank.create(folder / "deep", "aaaa", layer=2)
    deep.add(drawn("four", 4), small_delta("four", 4))
    with pytest.raises(
        ValueError, match=r"by layer 2, .* by layer 1, mean; learn the task again with bank\.layer=1"
    ):
        command("add", folder / "bank", folder / "deep" / "tasks" / "four")
    with pytest.raises(ValueError, match="is the base model of"):
        command("add", folder / "bank", folder / "other" / "tasks" / BASE)
    assert DeltaBank(folder / "bank").generation == 3


@pytest.mark.parametrize(
    "words", [["bank", "show", "bank"], ["bank", "verify", "bank"], ["mask", "stats", "mask"]]
)
def test_whoever_reads_only_the_beginning_is_one_exit_code(
    words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As `| head` does; here nobody reads at all."""
    small_delta("one", 1).mask.save(folder / "mask")
    monkeypatch.chdir(folder)
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(words) == 128 + signal.SIGPIPE
    assert capfd.readouterr().err == ""


def test_verify_lists_every_problem(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for task in ("one", "two"):
        DeltaBank(folder / "bank").path(task).unlink()
    with pytest.raises(ValueError, match="2 problems, listed above"):
        command("verify", folder / "bank")
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_an_export_says_where_it_lies(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ended without a word."""
    monkeypatch.setattr("trace_dist.bank.export.export", lambda *_: None)
    command("export", folder / "bank", "--base", "base", "--task", "one", "--out", "a folder")
    assert capsys.readouterr().out == "written: a folder\n"


@pytest.mark.parametrize("action", ACTIONS)
def test_no_bank(action: str, tmp_path: Path) -> None:
    rest = {
        "add": ["source"],
        "remove": ["task"],
        "rename": ["task", "name"],
        "merge": ["other", "--out", "out"],
        "export": ["--base", "base", "--task", "task", "--out", "out"],
    }
    with pytest.raises(ValueError, match=r"bank\.json: no such file"):
        command(action, tmp_path, *rest.get(action, []))
