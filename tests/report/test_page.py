"""The report's pages: written, parsed back, and looked at for what a browser would choke on."""

from __future__ import annotations

import copy
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from PIL import Image
from report.samples import LABELS, MINUS, make_results
from rich.console import Console

from trace_dist.report import render_png, summary_table, write_report
from trace_dist.report.theme import DARK, LIGHT

VOID = {"meta", "br", "hr", "img", "input", "link"}
HEADINGS = {
    "general": "General abilities",
    "masks": "Where the masks lie",
    "memory": "Memory",
    "delta_bytes": "Delta on disk",
    "specificity": "Cosine of the tasks' updates",
    "retrieval": "true ↓ retrieved →",
    "overlap": "Shared entries",
    "config": "Configuration",
}


class Page(HTMLParser):
    """Parses a page strictly: every tag closed in order; keeps text, attributes and ids."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


@pytest.fixture(scope="module")
def full_page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("report")
    return Page(write_report(make_results(["reverse", "spiral", "rotate"]), folder / "new" / "report.html"))


def test_page_shows_every_name_and_value(full_page: Page) -> None:
    for word in ["reverse", "spiral", "rotate", "sum", "reverse_short", *LABELS, *HEADINGS.values()]:
        assert word in full_page.text, word
    for value in [
        "99.3",
        "98.7",
        "64.1",
        "2.81",
        "16.00",
        "99.8 %",
        "0.8 %",
        "187",
        "0.77",
        "0.46",
        f"{MINUS}0.23",
        "253.9 KiB",
    ]:
        assert value in full_page.text, value
    for fact in [
        "predicted 2.80",
        "5 min 12 s",
        "2026-11-22",
        "4f2a9c1",
        "2.13.0",
        # of the target's weights, and of the weights whose memory was measured
        "dtype float32",
        "measured in bfloat16",
        "granularity: block",
    ]:
        assert fact in full_page.text, fact
    assert "on 2 ranks of zero3, started by deepspeed" in full_page.text


def test_page_is_self_contained(full_page: Page) -> None:
    assert "http:" not in full_page.source
    assert "https:" not in full_page.source
    tags = {tag for tag, _, _ in full_page.attributes}
    assert not tags & {"script", "link", "img", "iframe"}
    links = full_page.values("href") + full_page.values("src")
    assert links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert "@import" not in full_page.source
    anchors = [link[1:] for tag, name, link in full_page.attributes if (tag, name) == ("a", "href")]
    assert len(anchors) > 8
    assert set(anchors) <= set(full_page.values("id"))
    assert any("default-src 'none'" in content for content in full_page.values("content"))


def test_ids_are_unique_and_references_resolve(full_page: Page) -> None:
    ids = full_page.values("id")
    assert len(ids) == len(set(ids))
    references = set(re.findall(r"url\(#([^)]+)\)", full_page.source))
    references |= {link[1:] for link in full_page.values("href") if link.startswith("#")}
    assert references
    assert references <= set(ids)


def test_charts_follow_the_colour_scheme(full_page: Page) -> None:
    assert set(LIGHT) == set(DARK)
    assert len(set(LIGHT.values())) == len(LIGHT)
    charts = re.findall(r"<svg.*?</svg>", full_page.source, flags=re.DOTALL)
    assert len(charts) == 1 + 2 + 2 + 3 + 3 + 1  # forgetting, margins, general sets, losses, masks, memory
    for chart in charts:
        assert "aria-label=" in chart
        assert not any(color in chart for color in LIGHT.values())
        assert set(re.findall(r"var\(--(\w+)\)", chart)) <= set(LIGHT)


def test_cells_are_tinted_by_their_value(full_page: Page) -> None:
    cells = re.findall(r'<td class="([^"]*)" style="--t: ([\d.]+)">([^<]+)</td>', full_page.source)
    assert ("trained strong", "0.993", "99.3") in cells  # just trained, above the limit of readable ink
    assert ("negative", "0.230", f"{MINUS}0.23") in cells
    assert ("strong", "1.000", "187") in cells  # all prompts of a task retrieved


@pytest.mark.parametrize("part", HEADINGS)
def test_missing_part_leaves_out_its_section_alone(tmp_path: Path, part: str) -> None:
    results = make_results(["reverse"])
    del results[part]
    text = Page(write_report(results, tmp_path / "report.html")).text
    for name, heading in HEADINGS.items():
        assert (heading in text) == (name != part), heading
    assert ("What the proxy has learned" in text) == (part != "specificity")


def test_bare_and_damaged_values_do_not_break_the_page(tmp_path: Path) -> None:
    results: dict[str, Any] = {
        "tasks": ["a", "b"],
        "general": ["g"],
        "modes": {
            "retrieved": {"R": [[0.0, None], [math.nan, 41.5]], "general": [[None]], "forgetting": None},
            "our own": {"losses": {"a": [[0, math.inf], [1, 2.5]], "b": []}, "density": math.nan},
            "empty": None,
        },
        "masks": {"target": {"a": {"roles": ["q"], "density": [[None], [0.3]]}, "b": {}}, "proxy": None},
        "memory": {"categories": {"masked": {"weights": None}, "full": None}},
        "retrieval": None,
        "specificity": {"cosine": [[1.0, None], [None, 1.0]]},
        "overlap": {
            "retrieved": {"tasks": ["a", "b"], "matrix": [[1.0, None], None]},
            "our own": None,
            "empty": {},
        },
        "delta_bytes": {"a": None},
        "run_info": {"stages": None},
    }
    page = Page(write_report(results, tmp_path / "report.html"))
    assert "41.5" in page.text
    assert "our own" in page.text
    assert not re.search(r"\b(nan|None|inf)\b", page.text)
    with Image.open(render_png(results, tmp_path / "report.png")) as image:
        assert image.width == 1600


def test_nothing_but_tasks_and_modes_is_needed(tmp_path: Path) -> None:
    text = Page(write_report({"tasks": ["a"], "modes": {"full": {}}}, tmp_path / "report.html")).text
    assert "One task was learned: a." in text
    assert not any(heading in text for heading in HEADINGS.values())


def test_names_are_escaped_and_never_typeset(tmp_path: Path) -> None:
    names = ['<script>alert("1")</script>', "a & b's", "$\\frac{1}{0}$", "#0072b2", "{{ view }}"]
    results = make_results(names)
    results["modes"]["<b>bold</b>"] = results["modes"].pop("lora")
    results["config"] = {"<i>key": "</pre><script>"}
    page = Page(write_report(results, tmp_path / "report.html"))
    assert "<script" not in page.source
    assert "<b>bold" not in page.source
    for name in [*names, "<b>bold</b>", "<i>key", "</pre><script>"]:
        assert name in page.text, name
    render_png(results, tmp_path / "report.png")
    Console(file=(tmp_path / "table.txt").open("w"), width=120).print(summary_table(results))


@pytest.mark.parametrize("num_tasks", [1, 12])
def test_few_and_many_tasks_with_long_names(tmp_path: Path, num_tasks: int) -> None:
    names = [
        f"a_family_of_tasks_with_long_names_number_{i}_of_{num_tasks}_in_a_row" for i in range(num_tasks)
    ]
    results = make_results(names, num_layers=(24, 80))
    for mode in results["modes"].values():  # one chart of each kind per task takes long, two are enough
        mode["losses"] = {name: mode["losses"][name] for name in names[:2]}
    page = Page(write_report(results, tmp_path / "report.html"))
    assert all(name in page.text for name in names)
    assert len(page.source) < 2_000_000
    with Image.open(render_png(results, tmp_path / "report.png")) as image:
        assert image.width == 1600
        assert 500 <= image.height <= 1200


def test_report_is_reproducible_and_leaves_matplotlib_alone(tmp_path: Path) -> None:
    results = make_results(["reverse"])
    before, original = dict(mpl.rcParams), copy.deepcopy(results)
    first = write_report(results, tmp_path / "1.html").read_bytes()
    assert first == write_report(results, tmp_path / "2.html").read_bytes()
    assert dict(mpl.rcParams) == before
    assert results == original


def test_held_out_text_is_shown_with_its_change(tmp_path: Path) -> None:
    results = {
        "tasks": ["a"],
        "modes": {"full": {"R": [[0.0], [50.0]], "bits_per_byte": {"prose": [1.25, 1.5]}}},
    }
    text = Page(write_report(results, tmp_path / "report.html")).text
    assert "Held-out text" in text
    assert all(value in text for value in ("prose", "1.250", "1.500", "+0.250"))


def test_confusion_has_a_column_for_the_base(tmp_path: Path) -> None:
    retrieval = {"tasks": ["a", "b"], "columns": ["base", "a", "b"], "confusion": [[7, 193, 0], [0, 0, 200]]}
    results = {"tasks": ["a", "b"], "modes": {"retrieved": {}}, "retrieval": retrieval}
    text = Page(write_report(results, tmp_path / "report.html")).text
    assert "193" in text
    assert "base" in text


def test_examples_say_what_was_asked_answered_and_wanted(full_page: Page) -> None:
    for words in (
        "Spell 'stream' backward.",
        "maerts",
        "I <b>cannot</b> say.",
        "atled ATLED",
        "✓ right",
        "✗ wrong 25 %",
        "1 right, 2 wrong shown",
    ):
        assert words in full_page.text, words
    assert 'class="other-task">base<' in full_page.source
    assert "<b>cannot" not in full_page.source


def test_margins_and_rejection_are_drawn_with_their_counts(full_page: Page, tmp_path: Path) -> None:
    for words in (
        "Margins of retrieval",
        "2 wrong",
        "all right",
        "of 5 % of a task's own",
        "7 rejected",
    ):
        assert words in full_page.text, words
    results = make_results(["reverse"])
    results = {key: results[key] for key in ("tasks", "modes", "retrieval")}
    results["modes"] = {"retrieved": {}}
    del results["retrieval"]["rejection"]
    text = Page(write_report(results, tmp_path / "report.html")).text
    assert "Margins of retrieval" in text
    assert "threshold" not in text
    for key in ("margins", "examples"):
        del results["retrieval"][key]
    text = Page(write_report(results, tmp_path / "old.html")).text
    assert "Margins" not in text
    assert "Examples" not in text
    assert "true ↓ retrieved →" in text


def test_masks_that_are_the_same_share_a_heat_map(tmp_path: Path) -> None:
    results = make_results(["reverse", "spiral"])
    results = {key: results[key] for key in ("tasks", "modes", "overlap", "config")}
    results["modes"] = {name: {"density": 0.05} for name in ("retrieved", "merged")}
    results["overlap"]["merged"] = copy.deepcopy(results["overlap"]["retrieved"])
    text = Page(write_report(results, tmp_path / "report.html")).text
    assert "Shared entries: retrieved, merged % of the row's task; 43.0 % on average; 5.0" in text
    assert text.count("Shared entries") == 1
    assert "isolation soft: a task takes smaller steps where earlier tasks trained" in text
