"""The looks at validation examples in the page and in the picture; nothing of them where a run has none."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image
from report.samples import make_results
from report.test_page import Page

from trace_dist.report import render_png, write_report
from trace_dist.report.narrative import narrate
from trace_dist.report.picture import _bottom_panels
from trace_dist.report.results import parse_results
from trace_dist.report.validation_plot import SCORE, draw_looks, draw_method_looks

LOOKS = [[50, 1.2, None], [100, 0.4, 80.0], [150, 0.6, 70.0]]


def looked(tasks: list[str]) -> dict[str, Any]:
    results = make_results(tasks)
    for name in ("retrieved", "full"):
        results["modes"][name]["validation"] = {task: copy.deepcopy(LOOKS) for task in tasks}
        results["modes"][name]["kept_steps"] = dict.fromkeys(tasks, 100)
    return results


def test_the_page_has_a_chart_of_each_task_and_one_of_its_score(tmp_path: Path) -> None:
    page = Page(write_report(looked(["reverse", "spiral"]), tmp_path / "report.html"))
    assert "the dot is the step whose values were kept" in page.text
    for task in ("reverse", "spiral"):
        assert f"Validation loss on {task}" in page.source
        assert f"Validation score on {task}" in page.source
    plain = Page(write_report(make_results(["reverse"]), tmp_path / "plain.html"))
    assert "Validation" not in plain.text


def test_the_kept_step_has_a_dot() -> None:
    view = parse_results(looked(["reverse"]))
    ax = Figure().subplots()
    draw_looks(ax, view, "reverse")
    lines = [line.get_xydata().tolist() for line in ax.lines]
    assert lines[0] == [[50, 1.2], [100, 0.4], [150, 0.6]]
    assert lines[1] == [[100, 0.4]]
    assert len(lines) == 4
    ax = Figure().subplots()
    draw_looks(ax, view, "reverse", SCORE)
    assert ax.lines[0].get_xydata().tolist() == [[100, 80], [150, 70]]
    ax = Figure().subplots()
    draw_method_looks(ax, parse_results(looked(["a", "b", "c"])).hero)
    assert len(ax.lines) == 6


def test_the_picture_has_a_panel_more(tmp_path: Path) -> None:
    plain, more = make_results(["reverse", "spiral"]), looked(["reverse", "spiral"])
    panels = [len(_bottom_panels(parse_results(results))) for results in (plain, more)]
    assert panels[1] == panels[0] + 1
    with Image.open(render_png(more, tmp_path / "run.png")) as image:
        assert image.width == 1600


@pytest.mark.parametrize(
    "looks",
    [
        None,
        3,
        [],
        {},
        {"reverse": None},
        {"reverse": [[1]]},
        {"reverse": ["x", [None, 1, 2], [1, math.nan, 2]]},
    ],
)
def test_looks_of_another_shape_are_left_out(looks: Any, tmp_path: Path) -> None:
    results = make_results(["reverse"])
    results["modes"]["retrieved"]["validation"] = looks
    results["modes"]["retrieved"]["kept_steps"] = looks
    assert parse_results(results).hero.looks == {}
    assert "Validation loss" not in Page(write_report(results, tmp_path / "report.html")).source


def test_the_story_says_what_the_rates_were_compared_by() -> None:
    results = make_results(["reverse"])
    assert "by the loss on held-out training examples." in " ".join(narrate(parse_results(results)))
    results["config"]["train"]["eval_every"] = 10
    assert "by the loss on validation examples." in " ".join(narrate(parse_results(results)))
