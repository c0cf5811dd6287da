"""The picture of a study: what entries bring, and what they cost in general text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trace_dist.benchmarks.document import Result
from trace_dist.report.plots import plain_numbers
from trace_dist.report.theme import LIGHT
from trace_dist.studies.cells import by_kind

MARKERS = ("o", "s", "^", "D")
Points = list[tuple[float, float, float]]
"""Of an arm at each density: entries, loss, rise of general text's loss."""


def draw(result: Result, out: Path) -> None:
    """Loss against trained entries, and what is forgotten against it; on the tasks that every shown arm was tuned on."""
    tasks = _common(result)
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 4), layout="constrained")
        quality, forgetting = figure.subplots(1, 2)
        points = {arm: _points(result, arm, tasks) for arm in result["arms"]}
        points = {arm: found for arm, found in points.items() if found}
        if max(map(len, points.values()), default=0) > 1:
            _draw_quality(result, points, quality)
        else:
            _draw_differences(result, quality)
        _draw_forgetting(result, points, forgetting)
        where = f"mean of {len(tasks)} task(s): {', '.join(tasks)}"
        figure.supxlabel(where, x=0.01, ha="left", fontsize=8)
        figure.savefig(out, dpi=150)


def _draw_quality(result: Result, points: Mapping[str, Points], ax: Axes) -> None:
    """The other panel's legend names the curves."""
    for arm, found in points.items():
        entries, losses, _ = zip(*found, strict=True)
        ax.plot(entries, losses, markersize=4, **look(result, arm))
    ax.set_xscale("log")
    ax.set_yscale("log")
    # From a mask's entries to those of full fine-tuning there are many decades.
    plain_numbers(ax.xaxis, (1,))
    plain_numbers(ax.yaxis, (1, 2, 5))
    ax.set_title("answer loss, nats per token", loc="left", fontsize=10)
    ax.set_xlabel("trained entries")


def _draw_differences(result: Result, ax: Axes) -> None:
    """By task and arm how far its loss lies from that of the reference, with its interval: one density makes no curve."""
    differences = at_first_density(result)
    rows = list(dict.fromkeys(["mean", *(each["task"] for found in differences for each in found["tasks"])]))
    for number, found in enumerate(differences):
        each = {"mean": found["mean"], **{one["task"]: one for one in found["tasks"]}}
        shift = (number - (len(differences) - 1) / 2) * 0.25
        known = [(row, each[name]) for row, name in enumerate(rows) if each.get(name)]
        values = [one["value"] for _, one in known]
        errors = [[one["value"] - one["low"], one["high"] - one["value"]] for _, one in known]
        style: dict[str, Any] = {
            "linestyle": "none",
            "markersize": 4,
            "capsize": 2,
            **look(result, found["arm"]),
        }
        label = f"{result['arms'][found['arm']]['label']}, {100 * found['density']:g} %"
        places = [row + shift for row, _ in known]
        ax.errorbar(values, places, xerr=list(zip(*errors, strict=True)) or None, label=label, **style)
    ax.axvline(0, color=LIGHT["muted"], linewidth=1)
    ax.set_yticks(range(len(rows)), rows)
    ax.invert_yaxis()
    reference = result["arms"][result["settings"]["study"]["reference"]]["label"]
    ax.set_title(f"answer loss minus that of {reference}, nats, with 95 % intervals", loc="left", fontsize=10)
    ax.set_xlabel("below 0 is better")
    if differences:
        # Above the panel's lower edge nothing is free where there are many tasks.
        ax.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def at_first_density(result: Result) -> list[Any]:
    """Differences to the reference, at the density that a study begins with; of several the panel could show none."""
    study = result["settings"]["study"]
    wanted = (study["reference"], study["stages"][0]["densities"][0])
    found = [each for each in result["differences"] if each["density"] == each["other_density"]]
    return [each for each in found if (each["other"], each["density"]) == wanted]


def _draw_forgetting(result: Result, points: Mapping[str, Points], ax: Axes) -> None:
    for arm, found in points.items():
        _, losses, rises = zip(*found, strict=True)
        label = result["arms"][arm]["label"]
        ax.plot(losses, rises, markersize=4, label=label, **look(result, arm))
    ax.set_xscale("log")
    plain_numbers(ax.xaxis, (1, 2, 5))
    ax.set_title("rise of general text's loss, nats per token", loc="left", fontsize=10)
    ax.set_xlabel("answer loss, nats per token")
    if points:
        # Beside the panel: a dozen arms leave no free place inside.
        ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def look(result: Result, arm: str) -> dict[str, Any]:
    """Colour and marker: there are more arms than colours, and those of one colour differ by their markers."""
    arms = result["arms"]
    colour = arms[arm]["colour"]
    alike = [name for name in arms if arms[name]["colour"] == colour]
    return {"color": LIGHT[colour], "marker": MARKERS[alike.index(arm) % len(MARKERS)]}


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


def _points(result: Result, arm: str, tasks: Sequence[str]) -> Points:
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
