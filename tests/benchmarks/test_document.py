"""docs/benchmarks.md shows what the committed results say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from trace_dist.benchmarks.document import SECTIONS, render

DOCS = Path(__file__).parents[2] / "docs"


def test_tables_are_made_from_the_results() -> None:
    page = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    assert render(page, DOCS / "results") == page


@pytest.mark.parametrize("section", SECTIONS)
def test_another_result_is_another_page(section: str, tmp_path: Path) -> None:
    (file, *_), _ = SECTIONS[section]
    results = tmp_path / "results"
    shutil.copytree(DOCS / "results", results)
    result = json.loads((results / file).read_text())
    result["run_info"]["commit"] = "0123456789ab"
    (results / file).write_text(json.dumps(result))
    page = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    assert "0123456789ab" in render(page, results).split(f"<!-- {section} -->")[1].split("<!-- /")[0]
