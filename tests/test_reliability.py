"""docs/reliability.md promises what tests hold, and no more."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fuzz.readers import READERS
from fuzz.run import cases

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def rows() -> list[tuple[str, str]]:
    """(promise, tests) of the table."""
    table = PAGE[PAGE.index("| promise | test |") :].split("\n\n")[0]
    cells = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| ")]
    return [(promise.strip(), tests) for promise, tests in cells[1:]]


def named(tests: str) -> list[tuple[str, str]]:
    """(file, test) of the tests of a row; ``::test`` is of the file before it, a file alone names no test."""
    found, file = [], ""
    for each in re.findall(r"`([^`]+)`", tests):
        path, _, test = each.partition("::")
        file = path or file
        found.append((file, test))
    return found


@pytest.mark.parametrize(("promise", "tests"), rows(), ids=lambda text: text[:40])
def test_every_promise_has_a_test_that_is_there(promise: str, tests: str) -> None:
    assert named(tests), promise
    for file, test in named(tests):
        source = (ROOT / file).read_text(encoding="utf-8")
        assert f"def {test or 'test_'}" in source, (file, test)


def test_the_fuzzing_that_is_reported_was_of_these_readers() -> None:
    found = json.loads((ROOT / "docs" / "results" / "fuzz.json").read_text())
    names, readers = [reader.name for reader in READERS], found["readers"]
    assert list(readers) == [name for name in names if name in readers]
    assert f"each of {len(names)} readers" in PAGE
    assert [name for name, counts in readers.items() if counts["failures"]] == []
    waiting = [name for name in names if cases(readers.get(name, {})) < 10_000]
    assert ("Not all of theirs have had" in PAGE) == bool(waiting)
    if waiting:
        assert f"Not all of theirs have had so far: {'; '.join(waiting)}." in PAGE
