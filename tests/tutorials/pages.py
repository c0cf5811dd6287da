"""The tutorials as the tests read them: blocks of code in order, commands as their words, and what their variables stand for."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Template
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "tutorials"
NAMED_MODEL = "HuggingFaceTB/SmolLM2-135M"
"""The model that the pages name; the tests put a tiny one in its place."""


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str


def blocks(page: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    return [Block(*found) for found in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]


def commands(block: Block, variables: Mapping[str, str]) -> Iterator[str]:
    """The lines of a bash block with variables as they are; lines that set one are left out."""
    for line in block.text.splitlines():
        if line and not re.fullmatch(r"[A-Z]+=\S+", line):
            yield Template(line).substitute(variables)


def words(command: str) -> list[str]:
    """The arguments of a ``trace-dist`` command, however it is started; empty for another program's."""
    start = r"^(trace-dist|.*--module trace_dist|.*-m trace_dist|launch/\S+( \d+| launch/\S+)?|sbatch .*?launch/\S+) "
    return shlex.split(re.sub(start, "", command)) if re.match(start, command) else []


def table_cells(page: str, column: int) -> list[str]:
    """What stands in code font in one column of all tables of a page."""
    rows = [
        line for line in (PAGES / f"{page}.md").read_text(encoding="utf-8").splitlines() if line[:2] == "| "
    ]
    return [code for row in rows for code in re.findall(r"`([^`]+)`", row.split("|")[column + 1])]
