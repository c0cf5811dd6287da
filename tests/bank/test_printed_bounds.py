"""Every limit in a committed result holds on the test prompts of its run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

RESULTS = Path(__file__).parents[2] / "docs" / "results"
LIMITS = ("error_bound", "gaussian_error_bound", "cantelli_error_bound")
"""Of all tasks together; the first two are also there ``_per_task``. What is left out are estimates."""


def retrievals(value: Any) -> Iterator[dict[str, Any]]:
    """Every account of a retrieval, wherever it stands."""
    if isinstance(value, dict):
        if "confusion" in value and "error_bound" in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from retrievals(each)


FOUND = {
    path.name: list(retrievals(json.loads(path.read_text(encoding="utf-8"))))
    for path in sorted(RESULTS.glob("*.json"))
}


def holds(wrong: int, total: int, percent: float) -> bool:
    """Whether the errors of test prompts, which are a sample, are compatible with a limit: binomial test at 1 %."""
    return bool(stats.binom.sf(wrong - 1, total, min(1.0, percent / 100)) >= 0.01)


@pytest.mark.parametrize("name", [name for name, found in FOUND.items() if found])
def test_limits_hold_on_test_prompts(name: str) -> None:
    for found in FOUND[name]:
        columns, rows = found["columns"], dict(zip(found["tasks"], found["confusion"], strict=True))
        wrong = {task: sum(row) - row[columns.index(task)] for task, row in rows.items()}
        total = sum(map(sum, rows.values()))
        # What is counted here is what the result says.
        assert 100 * (1 - sum(wrong.values()) / total) == pytest.approx(found["accuracy"])
        for limit in filter(found.__contains__, LIMITS):
            assert holds(sum(wrong.values()), total, found[limit]), limit
            for task, percent in zip(columns, found.get(f"{limit}_per_task", columns), strict=True):
                if task in rows and f"{limit}_per_task" in found:
                    assert holds(wrong[task], sum(rows[task]), percent), (limit, task)


def test_there_are_such_results() -> None:
    assert sum(map(len, FOUND.values())) >= 6


def test_a_limit_that_is_broken_is_seen() -> None:
    assert holds(0, 200, 0.0)
    assert holds(3, 200, 1.0)
    assert not holds(1, 200, 0.0)
    assert not holds(10, 200, 1.0)
