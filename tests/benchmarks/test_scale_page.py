"""docs/scale.md shows what the committed study says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from trace_dist.benchmarks.document import render
from trace_dist.benchmarks.scale_page import SECTIONS

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "scale.md").read_text(encoding="utf-8")


def test_tables_are_made_from_the_results() -> None:
    assert render(PAGE, DOCS / "results", SECTIONS) == PAGE


def test_another_result_is_another_page(tmp_path: Path) -> None:
    results = tmp_path / "results"
    shutil.copytree(DOCS / "results", results)
    study = json.loads((results / "scale.json").read_text())
    study["run_info"]["commit"] = "0123456789ab"
    (results / "scale.json").write_text(json.dumps(study))
    shown = sum("scale.json" in files for files, _ in SECTIONS.values())
    assert render(PAGE, results, SECTIONS).count("0123456789ab") == shown


def test_what_is_predicted_says_so() -> None:
    for section in ("scale_node", "scale_gpus", "scale_ranks"):
        before = PAGE.split(f"<!-- {section} -->")[0].rsplit("##", 1)[1]
        assert "prediction" in before, section
