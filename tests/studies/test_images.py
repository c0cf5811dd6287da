"""The study of class-incremental images: its protocols, its intervals, its table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from trace_dist.report.markdown import insert
from trace_dist.studies import images
from trace_dist.studies.images import (
    class_order,
    interval,
    protocol,
    read_run,
    run_study,
    summary,
    table,
)
from trace_dist.utils.files import read_json

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_classes_come_in_the_order_of_pilot(name: str) -> None:
    """numpy.random.seed(1993); numpy.random.permutation, as its data manager does."""
    np.random.seed(1993)
    order = np.random.permutation(10).tolist()
    assert class_order(10) == order
    cfg = read_run(ROOT / f"configs/{name}.yaml")
    assert [name for task in cfg.tasks for name in task.answers or []] == [str(label) for label in order]
    assert all(task.name == f"classes_{'_'.join(task.answers or [])}" for task in cfg.tasks)


def test_a_protocol_regroups_the_classes() -> None:
    cfg = read_run(ROOT / "configs/digits.yaml")
    two, five = protocol(cfg, 2, 0), protocol(cfg, 5, 3)
    assert [task.answers for task in two.tasks] == [task.answers for task in cfg.tasks]
    assert [len(task.answers or []) for task in five.tasks] == [5, 5]
    assert sum(task.steps or 0 for task in five.tasks) == sum(task.steps or 0 for task in two.tasks) == 400
    assert (five.seed, five.run_dir) == (3, "runs/digits/seed3/inc5")
    assert protocol(cfg, 2, 3).target.path == five.target.path != two.target.path
    with pytest.raises(ValueError, match=r"^increment=3: does not divide the 10 classes"):
        protocol(cfg, 3, 0)


def test_differences_are_paired_by_seed() -> None:
    def run(seed: int, ours: float, theirs: float) -> dict[str, Any]:
        def method(value: float, label: str) -> dict[str, Any]:
            numbers = {"pilot_average_accuracy": value, "average_accuracy": value - 1, "forgetting": 0.5}
            return {**numbers, "label": label}

        kept = method(ours, "retrieved") | {"retrieval": {"accuracy": 97.0}}
        return {
            "protocol": "B0-Inc2",
            "seed": seed,
            "methods": {"retrieved": kept, "full": method(theirs, "full")},
        }

    runs = [run(0, 90, 80), run(1, 94, 85), run(2, 98, 87)]
    found = summary(runs)["B0-Inc2"]
    mean, low, high = found["full"]["ours_above"]
    expected = stats.ttest_rel([90, 94, 98], [80, 85, 87]).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((10, expected.low, expected.high))
    assert interval([3.0]) == [3.0]
    about = {"run_info": {"date": "2026-01-01T", "commit": "abc"}, "meta_info": {"hardware": "2 cores"}}
    lines = table({"runs": runs, "summary": {"B0-Inc2": found}, **about}).splitlines()
    assert lines[0] == "**B0-Inc2**, 3 seeds:"
    assert lines[4].startswith("| retrieved | 94.0 ± 9.9 | 93.0 ± 9.9 | 0.5 ± 0.0 | 97.0 ± 0.0 | - |")
    assert "| +10.0 [+7.5, +12.5] |" in lines[5]


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_the_page_shows_the_committed_result(name: str) -> None:
    page = (ROOT / "docs/images.md").read_text(encoding="utf-8")
    assert insert(page, name, table(read_json(ROOT / f"docs/results/{name}.json"))) == page


def test_runs_of_other_methods_are_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are named before anything is trained that could not be summed up with them."""
    cfg, out = read_run(ROOT / "configs" / "digits.yaml"), tmp_path / "result.json"
    known = [{"protocol": "B0-Inc2", "seed": 0, "methods": {"retrieved": {}, "full": {}}}]
    out.write_text(json.dumps({"runs": known}))
    monkeypatch.setattr(images, "run_one", lambda _: pytest.fail("a run was begun"))
    with pytest.raises(
        ValueError, match=r"^continual\.methods=.*result\.json holds runs of retrieved, full; name these"
    ):
        run_study(cfg, [2], [0, 1], out)
    same = replace(cfg, continual=replace(cfg.continual, methods=["full", "retrieved"]))
    assert run_study(same, [2], [0], out) == {"runs": known}
