"""The picture of a run, and the labels of its lines."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from report.samples import make_results

from trace_dist.report import render_png
from trace_dist.report.plots import draw_forgetting, label_ends
from trace_dist.report.results import parse_results
from trace_dist.report.theme import LIGHT, new_figure


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


@given(st.lists(st.floats(-50, 150), min_size=1, max_size=8))
def test_line_labels_never_overlap_nor_leave_the_axes(heights: list[float]) -> None:
    ax = Figure().subplots()
    ax.set_ylim(0, 100)
    label_ends(ax, [(f"line {i}", height, "black") for i, height in enumerate(heights)])
    placed = sorted(text.xy[1] for text in ax.texts)
    assert all(above - below > 0.0899 for below, above in pairwise(placed))
    assert placed[0] > -0.0001
    assert placed[-1] < 1.0001


def test_a_score_of_100_leaves_room_for_what_was_forgotten() -> None:
    results = make_results(["reverse", "spiral"])
    results["modes"]["retrieved"]["R"][-1] = [100.0, 100.0]
    figure = new_figure(360, 200)
    canvas, ax = FigureCanvasAgg(figure), figure.subplots()
    draw_forgetting(ax, parse_results(results).methods[:1])
    score, forgotten = (text.get_window_extent(canvas.get_renderer()) for text in ax.texts)
    assert ax.texts[0].get_text().startswith("100.0")
    assert forgotten.x0 - score.x1 > 3
