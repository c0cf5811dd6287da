"""Tables for the terminal and for Markdown, and how names and numbers read in them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report.samples import LABELS, MINUS, make_results
from rich.console import Console

from trace_dist.report import summary_table
from trace_dist.report.markdown import insert, markdown_table
from trace_dist.report.narrative import narrate
from trace_dist.report.results import parse_results
from trace_dist.report.tables import (
    MISSING,
    count,
    duration,
    fixed,
    headline,
    method_cells,
    rate,
    shorten_all,
    signed,
    size,
)


def test_summary_table_has_one_row_per_mode(tmp_path: Path) -> None:
    with (tmp_path / "table.txt").open("w+", encoding="utf-8") as file:
        Console(file=file, width=80).print(summary_table(make_results(["reverse", "spiral", "rotate"])))
        file.seek(0)
        lines = file.read().splitlines()
    rows = {label: next(line for line in lines if line.strip().startswith(label)) for label in LABELS}
    assert rows["retrieved"].split() == ["retrieved", "99.3", "99.3", "0.0", "0.0", "8e-3", "5.0", "2.81"]
    assert rows["full fine-tuning"].split()[-7:] == [
        "98.7",
        "36.5",
        "93.3",
        f"{MINUS}67.5",
        "8e-3",
        "100.0",
        "16.00",
    ]
    assert rows["LoRA"].split()[-1] == MISSING  # its model states were not measured
    assert all(len(line) <= 80 for line in lines)


@given(st.lists(st.text("ab_", max_size=40), max_size=12), st.integers(8, 16))
def test_shortened_names_keep_their_length_and_stay_apart(names: list[str], length: int) -> None:
    distinct = list(dict.fromkeys(names))
    short = shorten_all(distinct, length)
    assert all(len(name) <= length for name in short)
    assert len(set(short)) == len(short)


def test_numbers_read_well() -> None:
    assert [fixed(-0.04), fixed(-3.21), fixed(math.nan)] == ["0.0", f"{MINUS}3.2", MISSING]
    assert [signed(1.26), signed(-1.0), signed(0.01)] == ["+1.3", f"{MINUS}1.0", "0.0"]
    assert [count(860), count(43_000), count(70.6e9)] == ["860", "43.0 k", "70.6 B"]
    assert [size(512), size(260_000), size(3 * 2**30)] == ["512 B", "253.9 KiB", "3.0 GiB"]
    assert [duration(0.42), duration(59.7), duration(312), duration(7_500)] == [
        "0.4 s",
        "1 min 00 s",
        "5 min 12 s",
        "2 h 05 min",
    ]


@pytest.mark.parametrize(
    ("density", "text"),
    [
        (0.04999953, "5.0"), (1.0, "100.0"), (0.005, "0.5"), (4e-4, "0.04"), (1e-4, "0.01"), (1.3e-6, "0.00013"), (0.0, "0.0"),
    ],
)  # fmt: skip
def test_small_densities_are_not_shown_as_nothing(density: float, text: str) -> None:
    results = make_results(["reverse", "spiral"])
    results["modes"]["retrieved"]["density"] = density
    view = parse_results(results)
    assert method_cells(view, view.hero)[5] == text
    assert text in [tile.value for tile in headline(view)]
    assert f"Training touched {text}\N{NO-BREAK SPACE}% of the maskable weights" in narrate(view)[0]


def test_what_the_probe_has_not_learned_is_said() -> None:
    """The log warned that a mask shows nothing, and the page said that it was projected."""
    results = make_results(["reverse", "spiral"])
    assert "has not learned" not in narrate(parse_results(results))[0]
    results["specificity"]["learning"]["spiral"]["after"] = 1.4
    results["config"] = {"probe": {"margin": 0.1}}
    text = narrate(parse_results(results))[0]
    assert "The probe has not learned spiral: its mask shows nothing." in text
    results["config"] = {"probe": {"margin": 0.05}}
    assert "has not learned" not in narrate(parse_results(results))[0]


def test_one_process_is_called_so() -> None:
    results = make_results(["reverse", "spiral"])
    results["run_info"] |= {"num_ranks": 1, "backend": "single", "launcher": "none"}
    assert "per task) in one process." in narrate(parse_results(results))[0]


@pytest.mark.parametrize(
    ("value", "text"),
    [(8e-3, "8e-3"), (2.5e-2, "2.5e-2"), (1.0, "1e0"), (0.111, "1.1e-1"), (math.nan, MISSING)],
)
def test_learning_rates_read_well(value: float, text: str) -> None:
    assert rate(value) == text


def test_it_is_said_how_learning_rates_were_chosen() -> None:
    results = make_results(["reverse"])
    raced = "Every learning rate won a race of 3 rates, each of which trained the first task for 40 steps, by the loss on "
    assert f"{raced}held-out training examples." in markdown_table(results)
    results = make_results(["reverse", "spiral", "rotate"])
    results["config"]["race"]["tasks"] = 2
    assert "each of which trained the first 2 tasks for 40 steps each, by the loss" in markdown_table(results)
    results["modes"]["lora"] |= {"rates": [], "lr": 1e-3}
    results["modes"]["random"]["rates"].append({"lr": 5e-2, "loss": 0.9})
    text = markdown_table(results)
    assert (
        "The learning rate of retrieved, merged, full fine-tuning and random mask won a race of 3 to 4 rates"
        in text
    )
    assert "That of LoRA was given, not tuned." in text
    for method in results["modes"].values():
        method["rates"] = []
    assert "The learning rates were given, not tuned." in markdown_table(results)
    for method in results["modes"].values():
        method.pop("lr")
    assert "learning rate" not in markdown_table(results)


def test_markdown_table_and_its_place() -> None:
    results = {
        "tasks": ["a"],
        "modes": {"full": {"R": [[0.0], [50.0]], "just_trained": [50.0], "average_accuracy": 50.0}},
        "run_info": {"date": "2026-01-02T03:04:05", "commit": "abc", "seconds": 61},
        "meta_info": {"hardware": "one core"},
    }
    table = markdown_table(results)
    assert "| full fine-tuning | 50.0 | 50.0 |" in table
    assert "2026-01-02, commit abc, one core; 1 min 01 s in all." in table
    results["modes"]["lora"] = {**results["modes"]["full"], "measured": {"commit": "abc"}}
    results["modes"]["full"]["measured"] = {"commit": "def"}
    results["modes"]["random"] = {**results["modes"]["full"]}
    several = "commits def (full fine-tuning, random mask), abc (LoRA)"
    assert f"2026-01-02, {several}, one core; 1 min 01 s in all." in markdown_table(results)
    results["modes"]["full"]["label"] = "a | b"
    assert r"| a \| b | 50.0 | 50.0 |" in markdown_table(results)
    document = "before\n<!-- x -->\nold\n<!-- /x -->\nafter"
    assert insert(document, "x", table) == f"before\n<!-- x -->\n\n{table}\n<!-- /x -->\nafter"
    with pytest.raises(ValueError, match="once each"):
        insert(document, "y", table)
