"""The picture of a study: what entries bring, and what they cost in general text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from trace_dist.benchmarks.document import Result
from trace_dist.report.plots import label_ends
from trace_dist.report.theme import LIGHT
from trace_dist.studies.cells import by_kind


def draw(result: Result, out: Path) -> None:
    """Loss against trained entries, and what is forgotten against it; on the tasks that every shown arm was tuned on."""
    tasks = _common(result)
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 4), layout="constrained")
        quality, forgetting = figure.subplots(1, 2)
        ends: list[tuple[str, float, str]] = []
        for arm in result["arms"]:
            points = _points(result, arm, tasks)
            if points:
                _draw_arm(result, arm, points, quality, forgetting)
                ends.append((result["arms"][arm]["label"], points[-1][1], _colour(result, arm)))
        quality.set_xscale("log")
        quality.set_yscale("log")
        forgetting.set_xscale("log")
        for axis in (quality.xaxis, quality.yaxis, forgetting.xaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axis.set_minor_formatter(NullFormatter())
        label_ends(quality, ends, gap=0.06, longest=34)
        where = f"mean of {len(tasks)} task(s): {', '.join(tasks)}"
        quality.set_title("answer loss, nats per token", loc="left", fontsize=10)
        forgetting.set_title("rise of general text's loss, nats per token", loc="left", fontsize=10)
        quality.set_xlabel("trained entries")
        forgetting.set_xlabel("answer loss, nats per token")
        figure.supxlabel(where, x=0.01, ha="left", fontsize=8)
        figure.savefig(out, dpi=150)


def _draw_arm(
    result: Result, arm: str, points: Sequence[tuple[float, float, float]], quality: Axes, forgetting: Axes
) -> None:
    entries, losses, rises = zip(*points, strict=True)
    style: dict[str, Any] = {"color": _colour(result, arm), "marker": "o", "markersize": 4}
    quality.plot(entries, losses, **style)
    forgetting.plot(losses, rises, **style)


def _colour(result: Result, arm: str) -> str:
    return LIGHT[result["arms"][arm]["colour"]]


def _common(result: Result) -> list[str]:
    """Tasks on which the arms of the first stage are known at its first density; where there are none, its first arm is."""
    first = result["settings"]["study"]["stages"][0]
    known = {(cell["task"], cell["arm"], cell["density"]) for cell in result["cells"] if cell["seeds"]}
    for arms in (first["arms"], first["arms"][:1]):
        wanted = [(arm, first["densities"][0]) for arm in arms]
        tasks = [task for task in result["bases"] if all((task, *kind) in known for kind in wanted)]
        if tasks:
            return tasks
    return []


def _points(result: Result, arm: str, tasks: Sequence[str]) -> list[tuple[float, float, float]]:
    """Entries, loss and rise of general text's loss at each density that is known on all tasks, rising."""
    found = []
    for name, _, cells in by_kind(result):
        by_task = {cell["task"]: cell for cell in cells}
        if name == arm and tasks and all(task in by_task for task in tasks):
            some = [by_task[task] for task in tasks]
            found.append(
                (
                    max(c["entries"] for c in some),
                    mean(c["loss"] for c in some),
                    mean(c["text_rise"] for c in some),
                )
            )
    return sorted(found)
