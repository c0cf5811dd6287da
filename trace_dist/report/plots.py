"""The charts of a run, one function each, drawn into a given `Axes`.

The page (`html`) and the picture for the README (`picture`) draw with the same functions. Labels stand beside
what they name, so a chart needs no legend; every axis carries its unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from trace_dist.report.results import Array, MaskView, MethodView, RunView, mapping, mean, number
from trace_dist.report.tables import percent, shorten, shorten_all
from trace_dist.report.theme import LIGHT, STRONG_TINT, category_color, heat_map, method_color

CATEGORY_LABELS = {
    "weights": "weights",
    "master": "fp32 master",
    "exp_avg": "first moment m",
    "exp_avg_sq": "second moment v",
    "gradients": "gradients",
    "indices": "indices",
}
_SHORT_CATEGORIES = {
    "weights": "weights",
    "master": "master",
    "exp_avg": "m",
    "exp_avg_sq": "v",
    "gradients": "grads",
}
_LOG_FROM_RATIO = 20.0  # a loss that falls by more than this is drawn on a log axis


def draw_accuracy_matrix(ax: Axes, method: MethodView, tasks: Sequence[str]) -> None:
    """Heat-map of `method.scores` in percent; the diagonal (just trained) is outlined."""
    scores = method.scores
    num_stages, num_tasks = scores.shape
    ax.imshow(np.ma.masked_invalid(scores), cmap=heat_map(under_text=True), vmin=0, vmax=100, aspect="auto")
    font_size, digits = (11, 1) if num_tasks <= 6 else (7, 0)
    for stage, task in np.ndindex(scores.shape):
        if math.isfinite(scores[stage, task]):
            dark = scores[stage, task] >= 100 * STRONG_TINT
            color = LIGHT["card"] if dark else LIGHT["ink"] if task < stage else LIGHT["muted"]
            ax.text(
                task,
                stage,
                f"{scores[stage, task]:.{digits}f}".removesuffix(".0"),
                ha="center",
                va="center",
                color=color,
                size=font_size,
            )
        if stage == task + 1:
            ax.add_patch(_outline(task, stage))
    _name_stages(ax, tasks, axis="y")
    ax.set_xticks(range(num_tasks), shorten_all(tasks, 9), rotation=0 if num_tasks <= 4 else 90)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    _gaps(ax, num_stages, num_tasks)


def _outline(column: int, row: int) -> Rectangle:
    inset: dict[str, Any] = {"fill": False, "edgecolor": LIGHT["ink"], "linewidth": 1.6, "zorder": 3}
    return Rectangle((column - 0.485, row - 0.475), 0.97, 0.95, **inset)


def _name_stages(ax: Axes, tasks: Sequence[str], axis: str) -> None:
    labels = ["base", *(f"+ {task}" for task in shorten_all(tasks, 9))]
    if axis == "y":
        ax.set_yticks(range(len(labels)), labels)
    else:
        ax.set_xticks(range(len(labels)), labels, rotation=0 if len("".join(labels)) <= 32 else 90)


def _gaps(ax: Axes, num_rows: int, num_cols: int) -> None:
    """Separate the cells of a heat-map by lines in the colour of the surface."""
    lines: dict[str, Any] = {"color": LIGHT["card"], "linewidth": 1.5}
    for row in range(1, num_rows):
        ax.axhline(row - 0.5, **lines)
    for col in range(1, num_cols):
        ax.axvline(col - 0.5, **lines)


def draw_forgetting(ax: Axes, methods: Sequence[MethodView]) -> None:
    """Per method a pale bar to the just-trained average and a full bar to the final one: the gap is forgotten.

    Dots are the single tasks at the end of the sequence.
    """
    for row, method in enumerate(methods):
        color = method_color(method.colour, row)
        before, after = mean(method.just_trained), mean(method.final)
        ax.barh(row, before, height=0.62, color=color, alpha=0.22, linewidth=0)
        ax.barh(row, after, height=0.62, color=color, alpha=0.9, linewidth=0)
        dots: dict[str, Any] = {"color": LIGHT["ink"], "edgecolors": LIGHT["card"], "linewidths": 0.8}
        ax.scatter(method.final, [row] * len(method.final), s=22, zorder=3, clip_on=False, **dots)
        beside: dict[str, Any] = {"textcoords": "offset points", "va": "center", "size": 11}
        ax.annotate(percent(after), (100, row), (9, 0), weight="bold", **beside)
        forgotten = method.stat("forgetting")
        if math.isfinite(forgotten):
            ax.annotate(f"forgot {forgotten:.1f}", (100, row), (68, 0), color=LIGHT["muted"], **beside)
    ax.set_yticks(range(len(methods)), [shorten(method.label, 18) for method in methods])
    ax.tick_params(axis="y", labelcolor=LIGHT["ink"], length=0, pad=8)
    ax.set_ylim(len(methods) - 0.4, -0.6)
    ax.set_xlim(0, 100)
    ax.set_xlabel("average score over tasks (%)")
    ax.grid(axis="x", zorder=0)
    ax.set_axisbelow(True)
    ax.spines["left"].set_visible(False)


def draw_general(ax: Axes, view: RunView, column: int) -> None:
    """The score on one general set after each stage, one line per method."""
    ends: list[tuple[str, float, str]] = []
    for position, method in enumerate(view.methods):
        scores = method.general[:, column]
        measured = np.flatnonzero(np.isfinite(scores))
        if measured.size:
            color = method_color(method.colour, position)
            ax.plot(measured, scores[measured], color=color, marker="o", markersize=4, clip_on=False)
            ends.append((method.label, scores[measured[-1]], color))
    ax.set_ylim(-2, 102)
    ax.set_xlim(0, len(view.tasks))
    _name_stages(ax, view.tasks, axis="x")
    ax.set_ylabel("score (%)")
    ax.set_xlabel("stage of the sequence")
    ax.grid(axis="y")
    label_ends(ax, ends)


def draw_losses(ax: Axes, view: RunView, task: str) -> None:
    """Training loss on one task, one line per method."""
    curves = [(method, position) for position, method in enumerate(view.methods) if task in method.losses]
    values = np.concatenate([method.losses[task][:, 1] for method, _ in curves])
    is_log = log_if_steep(ax, values)
    ends: list[tuple[str, float, str]] = []
    drawn: list[Array] = []
    for method, position in curves:
        curve = method.losses[task]
        if any(np.array_equal(curve, other) for other in drawn):
            continue  # retrieved and merged share one training
        drawn.append(curve)
        color = method_color(method.colour, position)
        ax.plot(*curve.T, color=color, linewidth=1.6, marker="o" if len(curve) == 1 else "")
        ends.append((method.label, curve[-1, 1], color))
    if not is_log:
        ax.set_ylim(bottom=min(0.0, float(values.min())))
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.set_xlabel("optimizer step")
    ax.set_ylabel("loss (nats per token)")
    ax.grid(axis="y")
    label_ends(ax, ends)


def log_if_steep(ax: Axes, values: Array) -> bool:
    """Make the vertical axis logarithmic where losses fall by a large factor; whether it was."""
    if not (values.size and values.min() > 0 and values.max() / values.min() > _LOG_FROM_RATIO):
        return False
    ax.set_yscale("log")
    plain_numbers(ax.yaxis)
    return True


def plain_numbers(axis: Axis, steps: Sequence[int] = (1,)) -> None:
    """Write the numbers of a logarithmic axis out: of each decade these multiples."""
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def label_ends(ax: Axes, ends: Sequence[tuple[str, float, str]], longest: int = 16) -> None:
    """Write (label, y, colour) at the right edge, pushed apart to at least 0.09 of the axes' height.

    All curves are drawn by now; labels are cut to ``longest`` characters.
    """
    gap = 0.09
    ax.autoscale_view()
    to_fraction = ax.transData + ax.transAxes.inverted()
    placed = sorted((float(to_fraction.transform((0.0, y))[1]), label, color) for label, y, color in ends)
    heights = [max(0.0, fraction) for fraction, _, _ in placed]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    overflow = max(0.0, heights[-1] - 1.0) if heights else 0.0
    for i in reversed(range(len(heights))):  # push the pile down again where it leaves the axes
        ceiling = heights[i + 1] - gap if i + 1 < len(heights) else heights[i] - overflow
        heights[i] = min(heights[i], ceiling)
    for height, (_, label, color) in zip(heights, placed, strict=True):
        ax.annotate(
            shorten(label, longest),
            (1.0, height),
            xycoords="axes fraction",
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=color,
            size=10.5,
            annotation_clip=False,
        )


def draw_mask(ax: Axes, mask: MaskView, vmax: float, title: str, is_alone: bool) -> AxesImage:
    """Density of one mask, layers (top = first) by roles.

    The height is the relative depth, whatever the number of layers: masks are projected along it. One that stands alone has room
    for level names of its roles.
    """
    num_layers, num_roles = mask.density.shape
    image = ax.imshow(
        np.ma.masked_invalid(100 * mask.density),
        cmap=heat_map(under_text=False),
        vmin=0,
        vmax=100 * vmax,
        aspect="auto",
        interpolation="none",
    )
    upright = 90 if num_roles > 8 or not is_alone else 0
    ax.set_xticks(range(num_roles), [shorten(role, 6) for role in mask.roles], rotation=upright)
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.set_ylabel("layer")
    ax.set_title(title)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    _gaps(ax, num_layers if num_layers <= 40 else 1, num_roles)
    return image


def draw_mask_row(fig: Figure | SubFigure, masks: Mapping[str, MaskView], ceiling: float) -> None:
    """The masks of several models (name -> mask) side by side, and their common colour scale."""
    axes = fig.subplots(1, len(masks), squeeze=False)[0]
    for ax, (model, mask) in zip(axes, masks.items(), strict=True):
        image = draw_mask(ax, mask, ceiling, model, len(masks) == 1)
    bar = fig.colorbar(image, ax=axes[-1], aspect=30, fraction=0.06, pad=0.03)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.set_label("selected (%)")
    bar.ax.tick_params(length=0)


def draw_memory(ax: Axes, memory: Mapping[str, object]) -> None:
    """Model-state bytes per parameter, stacked by category; a diamond marks the prediction."""
    categories = mapping(memory.get("categories"))
    predicted = mapping(memory.get("predicted_bytes_per_param"))
    rows = {name: _positive(parts) for name, parts in categories.items()}
    widest = max((sum(parts.values()) for parts in rows.values()), default=0.0) or 1.0
    pad = 0.02 * widest
    for row, (name, parts) in enumerate(rows.items()):
        left = 0.0
        for category, size in parts.items():
            ax.barh(row, size, left=left, height=0.56, color=category_color(category), linewidth=0)
            label = _SHORT_CATEGORIES.get(category, category)
            if size > 0.06 * widest:
                upright = size < 0.026 * len(label) * widest
                style: dict[str, Any] = {"color": LIGHT["card"], "size": 10, "rotation": 90 if upright else 0}
                ax.text(left + size / 2, row, label, ha="center", va="center", **style)
            left += size
        total = number(mapping(memory.get("bytes_per_param")).get(name))
        ax.text(left + pad, row, f"{left if math.isnan(total) else total:.2f}", va="center", weight="bold")
        guess = number(predicted.get(name))
        if math.isfinite(guess):
            ax.plot(guess, row + 0.41, marker="D", markersize=5, color=LIGHT["ink"], clip_on=False)
            ax.text(
                guess + pad, row + 0.42, f"predicted {guess:.2f}", va="center", color=LIGHT["muted"], size=10
            )
    ax.set_yticks(range(len(rows)), [shorten(name, 18) for name in rows])
    ax.tick_params(axis="y", labelcolor=LIGHT["ink"], length=0)
    ax.set_ylim(len(rows) - 0.35, -0.5)
    ax.set_xlim(0, widest * 1.25)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.set_xlabel("model states (bytes per parameter, all ranks together)")
    ax.grid(axis="x")
    ax.set_axisbelow(True)
    ax.spines["left"].set_visible(False)


def _positive(parts: object) -> dict[str, float]:
    return {str(name): number(size) for name, size in mapping(parts).items() if number(size) > 0}


def mask_ceiling(masks: Sequence[MaskView]) -> float:
    """Density at the dark end of the colour scale, one for all `masks` so that they compare."""
    finite = [mask.density[np.isfinite(mask.density)] for mask in masks]
    return max((float(values.max()) for values in finite if values.size), default=0.0) or 1.0


def mean_mask(masks: Sequence[MaskView]) -> MaskView:
    """The masks of several tasks averaged; those shaped unlike the first are left out."""
    first = masks[0]
    alike = [
        mask.density
        for mask in masks
        if mask.roles == first.roles and mask.density.shape == first.density.shape
    ]
    return MaskView(first.roles, np.mean(alike, axis=0))
