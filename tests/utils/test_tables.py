"""Tables are read by people and by programs; names are not cut for either."""

from __future__ import annotations

import pytest
from rich.console import Console
from rich.table import Table

from trace_dist.utils.tables import print_table

NAMES = [f"model.layers.{number}.{'self_attn.' * 12}q_proj.weight" for number in (1, 2)]


@pytest.mark.parametrize("terminal", [False, True])
def test_no_name_is_cut(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In 80 columns both names began alike and ended with dots: a file of them could not be told apart."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(Console, "is_terminal", terminal)
    table = Table("tensor", "units")
    for name in NAMES:
        table.add_row(name, "12")
    print_table(table, markup=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    cells = [line.split("│")[1].strip() for line in lines]
    assert "".join(cells) == "".join(NAMES)
    assert (cells == NAMES) is not terminal
    assert (max(map(len, lines)) <= 80) is terminal


@pytest.mark.parametrize("terminal", [False, True])
def test_headings_are_folded_before_names_are_broken(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The widest column gave way first, and names were broken that a search of the output did not find. What programs read has a
    line for each row."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(Console, "is_terminal", terminal)
    name = "model.layers.0.self_attn.q_proj.weight"
    table = Table("tensor", "units", "% of the entries of the mask", "a note")
    table.add_row(name, "12", "16.86", "words of a sentence that need more than one line of the table")
    print_table(table, markup=False)
    out = capsys.readouterr().out
    assert name in out
    assert "sentence" in out
    assert "% of the" in out
    rows = [line for line in out.splitlines() if line.startswith("│")]
    assert all(len(line) <= 80 for line in rows) if terminal else len(rows) == 1
