"""The report on real pages: written, parsed back, and looked at for what a browser would choke on."""

from __future__ import annotations

import copy
import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from trace_dist.report import load_results, render_png, summary_table, write_report
from trace_dist.report.markdown import insert, markdown_table
from trace_dist.report.plots import label_ends
from trace_dist.report.results import parse_results
from trace_dist.report.tables import MISSING, count, duration, fixed, shorten_all, signed, size
from trace_dist.report.theme import DARK, LIGHT

ROLES = ["q", "k", "v", "o", "gate", "up", "down"]
LABELS = ["retrieved", "merged", "full fine-tuning", "LoRA", "random mask"]
MINUS = "\N{MINUS SIGN}"
VOID = {"meta", "br", "hr", "img", "input", "link"}
HEADINGS = {
    "general": "General abilities",
    "masks": "Where the masks lie",
    "memory": "Memory",
    "delta_bytes": "Delta on disk",
    "specificity": "Cosine of the tasks' updates",
    "retrieval": "true ↓ retrieved →",
    "config": "Configuration",
}


def make_mode(
    tasks: list[str], keep: float, learn: float, density: float, rng: np.random.Generator
) -> dict[str, Any]:
    """A mode that learns each task to `learn` percent and keeps the share `keep` of it at each later task."""
    num_tasks = len(tasks)
    scores = rng.uniform(0, 3, (num_tasks + 1, num_tasks))
    for stage in range(1, num_tasks + 1):
        for task in range(stage):
            scores[stage, task] = learn * keep ** (stage - 1 - task)
    general = 100 - np.outer(np.linspace(0, 3, num_tasks + 1), [30, 20]) * (1 - keep)
    steps = np.arange(0, 200, 10)
    curve = [[int(step), float(2 * math.exp(-step / (20 + 10 * density)) + 0.01)] for step in steps]
    return {
        "R": scores.round(1).tolist(),
        "general": general.tolist(),
        "average_accuracy": float(scores[-1].mean()),
        "forgetting": float((learn - scores[-1, :-1]).mean()) if num_tasks > 1 else 0.0,
        "general_delta": float((general[-1] - general[0]).mean()),
        "just_trained": [learn] * num_tasks,
        "density": density,
        "trainable": int(860_000 * density),
        "losses": dict.fromkeys(tasks, curve),
    }


def make_results(tasks: list[str], num_layers: tuple[int, int] = (4, 12)) -> dict[str, Any]:
    """A whole `results.json` with every optional part."""
    rng = np.random.default_rng(0)
    num_tasks = len(tasks)
    masks = {
        model: {
            t: {"layers": n, "roles": ROLES, "density": rng.uniform(0, 0.2, (n, 7)).tolist()} for t in tasks
        }
        for model, n in zip(("proxy", "target"), num_layers, strict=True)
    }
    return {
        "tasks": tasks,
        "general": ["sum", "reverse_short"],
        "modes": {
            "retrieved": make_mode(tasks, 1.0, 99.3, 0.05, rng),
            "merged": make_mode(tasks, 0.9, 99.3, 0.05, rng),
            "full": make_mode(tasks, 0.1, 98.7, 1.0, rng),
            "lora": make_mode(tasks, 0.4, 96.2, 0.03, rng),
            "random": make_mode(tasks, 0.9, 64.1, 0.05, rng),
        },
        "baselines": {"majority": [0.5] * num_tasks, "train_test_overlap": [0.0] * num_tasks},
        "masks": masks,
        "specificity": {
            "tasks": tasks,
            "cosine": (np.eye(num_tasks) * 1.23 - 0.23).tolist(),
            "specificity": [0.77] * num_tasks,
        },
        "retrieval": {
            "accuracy": 99.8,
            "error_bound": 0.8,
            "confusion": (np.eye(num_tasks) * 187).tolist(),
            "tasks": tasks,
            "num_clusters": 3,
        },
        "memory": {
            "bytes_per_param": {"masked": 2.81, "full": 16.0},
            "categories": {
                "masked": {"weights": 2.0, "master": 0.2, "exp_avg": 0.2, "exp_avg_sq": 0.2, "indices": 0.01},
                "full": {"weights": 2, "master": 4, "exp_avg": 4, "exp_avg_sq": 4, "gradients": 2},
            },
            "predicted_bytes_per_param": {"masked": 2.8, "full": 16},
            "peak_rss_gib": {"masked": 0.91, "full": 1.32},
            "dtype": "bfloat16",
        },
        "delta_bytes": dict.fromkeys(tasks, 260_000),
        "bytes_per_entry": 6.0,
        "run_info": {
            "date": "2026-11-22",
            "commit": "4f2a9c1",
            "seconds": 312,
            "stages": {"pretrain": 41.0, "probe": 22.0},
            "launcher": "deepspeed",
            "num_ranks": 2,
            "backend": "zero3",
        },
        "meta_info": {"hardware": "2 CPU cores", "versions": {"torch": "2.13.0"}},
        "config": {"mask": {"density": 0.05, "granularity": "block"}, "train": {"lr": 0.001}},
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
        "bfloat16",
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
    assert len(charts) == 1 + 2 + 3 + 3 + 1  # forgetting, general sets, masks, losses, memory
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


def test_picture_has_the_size_and_the_panels(tmp_path: Path) -> None:
    results = make_results(["reverse", "spiral", "rotate"])
    out = render_png(results, tmp_path / "pictures" / "run.png")
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert (image.width, image.height) == (1600, 668)
        pixels = np.asarray(image.convert("RGB")).astype(int)
    for role in ("blue", "vermillion", "green"):  # accuracy, full fine-tuning, second moment
        color = [int(LIGHT[role][i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - color).sum(axis=-1) < 12).sum() > 500, role


def test_report_is_reproducible_and_leaves_matplotlib_alone(tmp_path: Path) -> None:
    results = make_results(["reverse"])
    before, original = dict(mpl.rcParams), copy.deepcopy(results)
    first = write_report(results, tmp_path / "1.html").read_bytes()
    assert first == write_report(results, tmp_path / "2.html").read_bytes()
    assert dict(mpl.rcParams) == before
    assert results == original


def test_summary_table_has_one_row_per_mode(tmp_path: Path) -> None:
    with (tmp_path / "table.txt").open("w+", encoding="utf-8") as file:
        Console(file=file, width=80).print(summary_table(make_results(["reverse", "spiral", "rotate"])))
        file.seek(0)
        lines = file.read().splitlines()
    rows = {label: next(line for line in lines if line.strip().startswith(label)) for label in LABELS}
    assert rows["retrieved"].split() == ["retrieved", "99.3", "99.3", "0.0", "0.0", "5.0", "2.81"]
    assert rows["full fine-tuning"].split()[-6:] == ["98.7", "36.5", "93.3", f"{MINUS}67.5", "100.0", "16.00"]
    assert rows["LoRA"].split()[-1] == MISSING  # its model states were not measured
    assert all(len(line) <= 80 for line in lines)


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
    mode = parse_results(
        {"tasks": ["a", "b"], "modes": {"full": {"R": scores, "just_trained": [None, 96]}}}
    ).modes[0]
    assert mode.just_trained.tolist() == [90, 96]
    assert mode.final.tolist() == [80, 95]


def test_interrupted_sequence_ends_at_its_last_measured_stage() -> None:
    mode = parse_results({"tasks": ["a", "b"], "modes": {"full": {"R": [[1, 2], [90, 3]]}}}).modes[0]
    assert mode.final.tolist() == [90, 3]
    assert math.isnan(mode.just_trained[1])


@given(st.lists(st.floats(-50, 150), min_size=1, max_size=8))
def test_line_labels_never_overlap_nor_leave_the_axes(heights: list[float]) -> None:
    ax = Figure().subplots()
    ax.set_ylim(0, 100)
    label_ends(ax, [(f"line {i}", height, "black") for i, height in enumerate(heights)])
    placed = sorted(text.xy[1] for text in ax.texts)
    assert all(above - below > 0.0899 for below, above in pairwise(placed))
    assert placed[0] > -0.0001
    assert placed[-1] < 1.0001


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
    document = "before\n<!-- x -->\nold\n<!-- /x -->\nafter"
    assert insert(document, "x", table) == f"before\n<!-- x -->\n\n{table}\n<!-- /x -->\nafter"
    with pytest.raises(ValueError, match="once each"):
        insert(document, "y", table)
