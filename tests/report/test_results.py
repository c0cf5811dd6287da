"""What the report takes from `results.json`, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from report.samples import make_results

from trace_dist.report import load_results, render_png, summary_table, write_report
from trace_dist.report.narrative import narrate
from trace_dist.report.results import parse_results
from trace_dist.report.theme import LIGHT, method_color


@pytest.mark.parametrize("field", ["tasks", "modes"])
def test_missing_required_field_is_named(tmp_path: Path, field: str) -> None:
    results = make_results(["reverse"])
    del results[field]
    for write in (write_report, render_png):
        with pytest.raises(ValueError, match=f"'{field}' is missing or empty; pass the results"):
            write(results, tmp_path / "out")
    with pytest.raises(ValueError, match=f"'{field}' is missing"):
        summary_table(results)
    assert not (tmp_path / "out").exists()


def test_matrix_of_other_tasks_is_refused(tmp_path: Path) -> None:
    results = make_results(["reverse", "spiral"])
    results["tasks"] = ["reverse"]
    with pytest.raises(ValueError, match=r"modes\.retrieved\.R: 3 x 2 values, must be at most 2 x 1"):
        write_report(results, tmp_path / "report.html")
    with pytest.raises(ValueError, match="'tasks' must be a list"):
        write_report({**results, "tasks": "reverse"}, tmp_path / "report.html")


def test_load_results_reads_file_or_folder(tmp_path: Path) -> None:
    results = make_results(["reverse"])
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert load_results(tmp_path / "results.json") == load_results(str(tmp_path)) == results


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"", "not valid JSON"),
        (b'{"tasks": [', "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[1, 2]", "holds a list, must be an object"),
    ],
)
def test_load_results_says_what_is_wrong(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as caught:
        load_results(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_view_fills_just_trained_from_the_diagonal() -> None:
    scores = [[1, 2], [90, 3], [80, 95]]
    method = parse_results(
        {"tasks": ["a", "b"], "modes": {"full": {"R": scores, "just_trained": [None, 96]}}}
    ).methods[0]
    assert method.just_trained.tolist() == [90, 96]
    assert method.final.tolist() == [80, 95]


def test_interrupted_sequence_ends_at_its_last_measured_stage() -> None:
    method = parse_results({"tasks": ["a", "b"], "modes": {"full": {"R": [[1, 2], [90, 3]]}}}).methods[0]
    assert method.final.tolist() == [90, 3]
    assert math.isnan(method.just_trained[1])


def test_a_method_looks_as_its_result_says() -> None:
    """A method of somebody's own needs no row in the report."""
    results = make_results(["reverse"])
    results["modes"]["mine.drop"] = results["modes"]["full"] | {
        "label": "of my own",
        "colour": "green",
        "masked": True,
    }
    results["modes"]["odd"] = {"R": [[0.0], [50.0]], "colour": "no such colour"}
    view = parse_results(results)
    assert [method.name for method in view.methods] == list(results["modes"])
    mine, odd = view.method("mine.drop"), view.method("odd")
    assert mine is not None
    assert odd is not None
    assert (mine.label, method_color(mine.colour)) == ("of my own", LIGHT["green"])
    assert view.bytes_per_param("mine.drop") == view.bytes_per_param("retrieved")
    assert (odd.label, method_color(odd.colour, 1) in LIGHT.values()) == ("odd", True)
    assert math.isnan(view.bytes_per_param("odd"))
    assert "of my own" in " ".join(narrate(view))


@pytest.mark.parametrize(("density", "known"), [(0.05, True), (0.053, True), (0.09, False), (None, True)])
def test_states_of_a_mask_are_those_of_masks_of_its_size(density: float | None, known: bool) -> None:
    """A union of masks holds more than the mask whose memory was measured; earlier versions did not say its size."""
    results = make_results(["reverse"])
    results["memory"]["density"] = 0.05
    results["modes"]["union"] = results["modes"]["retrieved"] | {"density": density, "masked": True}
    found = parse_results(results).bytes_per_param("union")
    assert math.isnan(found) != known
