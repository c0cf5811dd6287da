"""The wide picture of a run for a README: accuracy matrices, forgetting, validation where there is some, masks, memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from trace_dist.report import plots, validation_plot
from trace_dist.report.results import RunView, mapping, parse_results
from trace_dist.report.tables import final_average, percent, shorten
from trace_dist.report.theme import LIGHT, method_color, theme
from trace_dist.utils.files import atomic_path

WIDTH_PX = 1600
_DPI = 100
_MAX_MATRICES = 5
_BOTTOM_INCHES = 3.6


def render_png(results: Mapping[str, Any], out: str | Path) -> Path:
    """Draw the key panels of a run, 1600 px wide, on a light ground; a missing part leaves its panel out.

    Raises:
        ValueError: `results` lacks "tasks" or "modes", or the file cannot be written; an older picture is then still there.
    """
    view = parse_results(results)
    out = Path(out)
    with theme():
        top_inches = 2.3 + 0.26 * min(len(view.tasks), 12)
        margins = ConstrainedLayoutEngine(rect=(0.008, 0.015, 0.984, 0.97), wspace=0.03)
        fig = Figure(figsize=(WIDTH_PX / _DPI, top_inches + _BOTTOM_INCHES), dpi=_DPI, layout=margins)
        top, bottom = fig.subfigures(2, 1, squeeze=False, height_ratios=[top_inches, _BOTTOM_INCHES])[:, 0]
        _draw_matrices(top, view)
        panels = _bottom_panels(view)
        row = bottom.subfigures(1, len(panels), width_ratios=[width for width, _ in panels], squeeze=False)[0]
        for subfigure, (_, draw) in zip(row, panels, strict=True):
            subfigure.patch.set_alpha(0)
            draw(subfigure)
        with atomic_path(out) as temporary:
            fig.savefig(temporary, format="png", facecolor=LIGHT["card"])
    return out


def _title(fig: SubFigure, text: str) -> None:
    fig.suptitle(text, x=0.01, ha="left", size=13, weight="bold", color=LIGHT["ink"])


def _draw_matrices(fig: SubFigure, view: RunView) -> None:
    methods = view.methods[:_MAX_MATRICES]
    _title(
        fig, "Score (%) on each task (column) after each stage of the sequence (row); outlined: just trained"
    )
    for position, (ax, method) in enumerate(
        zip(fig.subplots(1, len(methods), squeeze=False)[0], methods, strict=True)
    ):
        plots.draw_accuracy_matrix(ax, method, view.tasks)
        title = f"{shorten(method.label, 20)}: {percent(final_average(method))}"
        ax.set_title(title, color=method_color(method.colour, position), pad=10)
        if position:
            ax.set_yticks([])


def _bottom_panels(view: RunView) -> list[tuple[float, Callable[[SubFigure], None]]]:
    """(relative width, draw) of the panels for which there is data."""

    def forgetting(fig: SubFigure) -> None:
        _title(fig, "Learned (pale) and kept (full)")
        plots.draw_forgetting(fig.subplots(), view.methods)

    def masks(fig: SubFigure) -> None:
        _title(fig, "Mask density, mean over tasks")
        means = {
            model: plots.mean_mask(list(by_task.values())) for model, by_task in view.masks.items() if by_task
        }
        plots.draw_mask_row(fig, means, plots.mask_ceiling(list(means.values())))

    def memory(fig: SubFigure) -> None:
        _title(fig, "Model states, measured")
        plots.draw_memory(fig.subplots(), view.part("memory"))

    def looks(fig: SubFigure) -> None:
        _title(fig, f"Validation, {shorten(view.hero.label, 20)}")
        validation_plot.draw_method_looks(fig.subplots(), view.hero)

    panels: list[tuple[float, Callable[[SubFigure], None]]] = [(5.6, forgetting)]
    if view.hero.looks:
        panels.append((4.6, looks))
    if any(view.masks.values()):
        panels.append((4.6, masks))
    if mapping(view.part("memory").get("categories")):
        panels.append((5.8, memory))
    return panels
