"""The looks at validation examples: a curve for each training, with a dot at the step whose values were kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from trace_dist.report.plots import label_ends, log_if_steep
from trace_dist.report.results import Array, MethodView, RunView
from trace_dist.report.theme import LIGHT, method_color

LOSS, SCORE = 1, 2
"""Columns of ``MethodView.looks``."""
_UNITS = {LOSS: "validation loss (nats per token)", SCORE: "validation score (%)"}
_TASK_COLOURS = ("blue", "vermillion", "green", "amber", "pink", "sky", "grey")


def draw_looks(ax: Axes, view: RunView, task: str, column: int = LOSS) -> None:
    """What the looks of one task found, one line per method."""
    curves = [
        (method.label, _measured(method.looks[task], column), method.kept_steps.get(task), color)
        for position, method in enumerate(view.methods)
        if task in method.looks
        for color in [method_color(method.colour, position)]
    ]
    _draw(ax, curves, column)


def draw_method_looks(ax: Axes, method: MethodView, column: int = LOSS) -> None:
    """What the looks of one method found, one line per task."""
    curves = [
        (task, _measured(looks, column), method.kept_steps.get(task), method_color(colour, position))
        for position, (task, looks) in enumerate(method.looks.items())
        for colour in [_TASK_COLOURS[position % len(_TASK_COLOURS)]]
    ]
    _draw(ax, curves, column)


def has_scores(view: RunView, task: str) -> bool:
    """Whether the looks of a task measured its metric."""
    return any(len(_measured(method.looks[task], SCORE)) for method in view.methods if task in method.looks)


def _measured(looks: Array, column: int) -> Array:
    points = looks[:, [0, column]]
    return points[np.isfinite(points).all(axis=1)]


def _draw(ax: Axes, curves: Sequence[tuple[str, Array, float | None, str]], column: int) -> None:
    known = [curve for curve in curves if len(curve[1])]
    steep = column == LOSS and log_if_steep(ax, np.concatenate([points[:, 1] for _, points, _, _ in known]))
    ends = []
    for label, points, kept, color in known:
        ax.plot(*points.T, color=color, linewidth=1.6, marker="o" if len(points) == 1 else "")
        ax.plot(*points[points[:, 0] == kept].T, color=color, marker="o", markersize=7, zorder=3, clip_on=False,
                markeredgecolor=LIGHT["card"], linewidth=0)  # fmt: skip
        ends.append((label, float(points[-1, 1]), color))
    if column == SCORE:
        ax.set_ylim(-2, 102)
    elif not steep:
        ax.set_ylim(bottom=0.0)
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(_UNITS[column])
    ax.grid(axis="y")
    label_ends(ax, ends)
