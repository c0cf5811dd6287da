"""docs/data.md shows what the committed record of the small TRACE order says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trace_dist.benchmarks.document import render
from trace_dist.benchmarks.trace_page import SECTIONS, record, table

DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_is_made_from_the_record() -> None:
    page = (DOCS / "data.md").read_text(encoding="utf-8")
    assert render(page, DOCS / "results", SECTIONS) == page


def test_a_record_keeps_each_tasks_scores() -> None:
    results: dict[str, Any] = {
        "tasks": ["a", "b"],
        "modes": {"retrieved": {"R": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]}},
        "baselines": {"majority": [7.0, 8.0], "num_test": [9, 10]},
        "config": {"tasks": [{"name": "b", "metric": "sari"}, {"name": "a", "metric": "choice"}]},
        "run_info": {"date": "2026-01-02T03:04:05", "commits": ["abc", "def"]},
        "meta_info": {"hardware": "one core"},
    }
    found = record(results)
    assert [tuple(row.values()) for row in found["rows"]] == [
        ("a", "choice", 1.0, 3.0, 5.0, 7.0, 9),
        ("b", "sari", 2.0, 6.0, 6.0, 8.0, 10),
    ]
    shown = table(found)
    assert "| b | sari | 2.0 | 6.0 | 6.0 | 8.0 |" in shown
    assert "2026-01-02, commit abc, def, one core." in shown
