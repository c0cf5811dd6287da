"""The actions of `bank`, through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from bank.samples import drawn, small_delta

from trace_dist import DeltaBank
from trace_dist.bank.bank import BASE
from trace_dist.cli.bank_commands import ACTIONS, bank_command
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


def test_verify_lists_every_problem(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for task in ("one", "two"):
        DeltaBank(folder / "bank").path(task).unlink()
    with pytest.raises(ValueError, match="2 problems, listed above"):
        command("verify", folder / "bank")
    assert len(capsys.readouterr().out.splitlines()) == 2


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
