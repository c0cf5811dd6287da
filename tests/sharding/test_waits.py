"""How often a step makes the host wait for a GPU, and how many kernels it launches: upper limits, counted without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engine import rank_meta
from launching import launch

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
MOST_LAUNCHES = {"element": 8, "block": 6, "block, cut short": 6, "row": 6, "column": 6}
"""Per masked parameter and micro-batch, between a layer's gradient and the compact buffer."""

pytestmark = pytest.mark.launcher


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("meta")
    launch(Path(rank_meta.__file__), 1, out, launcher="python")
    return json.loads((out / "found.json").read_text())


@pytest.mark.parametrize("kind", rank_meta.MASKS)
def test_a_micro_batch_waits_for_nothing_and_a_step_twice(found: dict[str, Any], kind: str) -> None:
    counts = found["zero3"][kind]
    assert counts["micro-batch"]["ours"] == 0
    assert counts["micro-batch"]["libraries"] <= 1  # transformers asks whether a batch is padded
    assert counts["step"]["waits"] <= 2  # for the loss, for the norm


@pytest.mark.parametrize("kind", rank_meta.MASKS)
def test_launches_stay_few(found: dict[str, Any], kind: str) -> None:
    counts = found["zero3"][kind]
    assert counts["micro-batch"]["launches"] <= MOST_LAUNCHES[kind]
    assert counts["step"]["adamw"] <= 2  # one for each block length
    assert counts["step"]["launches"] <= 10


def test_the_optimizer_launches_as_often_for_many_parameters(found: dict[str, Any]) -> None:
    few, many = found["zero3"]["row"], found["deep"]
    assert many["parameters"] == 6 * few["parameters"]
    assert many["step"] == few["step"]
    assert 32 * many["step"]["adamw"] <= many["parameters"]


@pytest.mark.parametrize("kind", rank_meta.MASKS)
def test_attaching_a_mask_and_swapping_a_delta_wait_for_nothing(found: dict[str, Any], kind: str) -> None:
    counts = found["zero3"][kind]
    assert counts["attach"] == 0
    assert counts["swap"] == 0
    # In and out again: one launch for each kind of tile, whatever the number of parameters.
    assert 2 <= counts["swap launches"] <= 4 < 2 * counts["parameters"]
    assert counts["resume"] <= counts["parameters"]  # its values come from files


@pytest.mark.parametrize("kind", ["element", "row"])
def test_more_ranks_ask_for_no_more(found: dict[str, Any], kind: str) -> None:
    few, many = found["zero3"][kind], found["many"][kind]
    for phase in ("attach", "step", "resume", "swap"):
        assert many[phase] == few[phase], phase
    asked, before = dict(many["micro-batch"]), dict(few["micro-batch"])
    # The device puts the one bucket in order, in five launches more than one for all pieces, which the host would make.
    more = (asked.pop("launches") - before.pop("launches")) * many["parameters"]
    assert round(more, 6) in (0, 5)
    assert asked == before


def test_a_model_that_every_rank_holds_waits_no_more(found: dict[str, Any]) -> None:
    assert found["replicated"]["micro-batch"]["ours"] == found["replicated"]["attach"] == 0
    assert found["replicated"]["step"]["waits"] <= 2


def test_products_of_rows_and_columns_are_aligned(found: dict[str, Any]) -> None:
    computed = [size for kind in ("row", "column") for size in found["zero3"][kind]["computed"]]
    assert computed
    assert all(size % 8 == 0 for size in computed)


def test_the_page_shows_what_is_counted(found: dict[str, Any]) -> None:
    assert table(found["zero3"]) in PAGE.read_text(encoding="utf-8")


def table(counts: dict[str, Any]) -> str:
    """The counts as Markdown."""
    heads = ("waits per micro-batch", "of these transformers'", "waits per optimizer step", "attach", "swap")
    heads += ("launches per parameter and micro-batch", "launches of the optimizer, all parameters")
    rows = [("ZeRO-3, 8 ranks", *heads), ("---", *["---:"] * len(heads))]
    for kind, found in counts.items():
        micro, step = found["micro-batch"], found["step"]
        numbers = (micro["ours"] + micro["libraries"], micro["libraries"], step["waits"], found["attach"])
        rows.append(
            (
                kind,
                *(f"{n:g}" for n in (*numbers, found["swap"])),
                f"{micro['launches']:.1f}",
                f"{step['launches']}",
            )
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def test_no_parameter_is_whole_when_deepspeed_would_move_the_model(found: dict[str, Any]) -> None:
    assert found["left whole"] == 0
