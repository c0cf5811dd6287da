"""What the page says of retrieval: margins of the prompts, what is rejected, and examples of what was answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from trace_dist.report import tables
from trace_dist.report.results import Array, RunView, mapping, number, sequence
from trace_dist.report.theme import LIGHT

MARKS_PX = 30
"""Height of a task's row of marks."""
RIGHT_FROM = 0.5
"""Score from which on an example counts as right."""


@dataclass(frozen=True)
class Strip:
    """A task's row of marks: values on the good side of 0 and on the bad one, and how many of each there are."""

    task: str
    good: Array
    bad: Array
    num_good: float
    num_bad: float


@dataclass(frozen=True)
class Example:
    """One example of the table."""

    prompt: str
    retrieved: str
    is_own: bool  # the task's own delta answered
    answer: str
    references: list[str]
    is_right: bool
    score: str  # empty where it is 0 or 1


def facts(view: RunView) -> list[tuple[str, str]]:
    """(name, text) of what was measured."""
    part = view.part("retrieval")
    pairs = [
        ("accuracy", tables.percent(number(part.get("accuracy")))),
        (
            "go to another task at most (95\N{NO-BREAK SPACE}% limit)",
            tables.percent(number(part.get("error_bound"))),
        ),
        ("of a task's own prompts that may be rejected", tables.percent(100 * reject_rate(view))),
        ("clusters", tables.fixed(number(part.get("num_clusters")), 0)),
    ]
    return [(name, text) for name, text in pairs if text != tables.MISSING]


def margins(view: RunView) -> list[Strip]:
    """Nats between a prompt's own task and the best other; above 0 it finds its own."""
    return _strips(view, "margins", "right", "wrong")


def typicality(view: RunView) -> list[Strip]:
    """Nats above the threshold of rejection; below 0 the base answers. None where nothing may be rejected."""
    return _strips(view, "rejection", "kept", "rejected")


def reject_rate(view: RunView) -> float:
    """Share of a task's own prompts that may be rejected, NaN where nothing may."""
    return number(mapping(view.part("retrieval").get("rejection")).get("rate"))


def _strips(view: RunView, key: str, good: str, bad: str) -> list[Strip]:
    part = view.part("retrieval")
    found = mapping(part.get(key))
    names = [str(task) for task in sequence(part.get("tasks"))] or view.tasks

    def at(name: str, index: int) -> Any:
        values = sequence(found.get(name))
        return values[index] if index < len(values) else None

    strips = []
    for index, task in enumerate(names):
        values = [_numbers(at(name, index)) for name in (good, bad)]
        if any(len(each) for each in values):
            counts = [
                len(each) if np.isnan(known := number(at(f"num_{name}", index))) else known
                for name, each in zip((good, bad), values, strict=True)
            ]
            strips.append(Strip(task, values[0], values[1], counts[0], counts[1]))
    return strips


def _numbers(values: Any) -> Array:
    found = np.array([number(value) for value in sequence(values)], dtype=np.float64)
    return found[np.isfinite(found)]


def draw_strips(ax: Axes, strips: Sequence[Strip], words: tuple[str, str], unit: str) -> None:
    """A row of marks per task: good values stand above its line, bad ones hang below, in another colour and with their number."""
    longest = max(float(np.abs(np.concatenate([s.good, s.bad])).max()) for s in strips)
    ax.set_xscale("symlog", linthresh=1.0, linscale=0.6)
    for row, strip in enumerate(strips):
        ax.axhline(row, color=LIGHT["rule"], linewidth=0.8)
        _marks(ax, strip.good, row, row - 0.36, LIGHT["blue"], 1.0)
        _marks(ax, strip.bad, row, row + 0.36, LIGHT["vermillion"], 1.6)
        _say(ax, row, strip, words)
    ax.axvline(0, color=LIGHT["ink"], linewidth=1.2)
    ax.set_yticks(range(len(strips)), tables.shorten_all([strip.task for strip in strips], 14))
    ax.tick_params(axis="y", labelcolor=LIGHT["ink"], length=0)
    ax.set_ylim(len(strips) - 0.4, -0.6)
    _decades(ax, longest, any(len(strip.bad) for strip in strips))
    ax.set_xlabel(unit)
    ax.grid(axis="x")
    ax.set_axisbelow(True)
    ax.spines["left"].set_visible(False)


def _marks(ax: Axes, values: Array, begin: float, end: float, color: str, width: float) -> None:
    """Upright marks as one path: a page may hold thousands."""
    if values.size:
        x = np.repeat(values, 3)
        y = np.tile([begin, end, np.nan], len(values))
        ax.plot(x, y, color=color, linewidth=width, solid_capstyle="butt")


def _say(ax: Axes, row: int, strip: Strip, words: tuple[str, str]) -> None:
    """How many there are, at the right edge: the bad ones alone, where there are any."""
    is_bad = strip.num_bad > 0
    text = f"{strip.num_bad:.0f} {words[1]}" if is_bad else f"all {words[0]}"
    style: dict[str, Any] = {"textcoords": "offset points", "va": "center", "size": 10.5}
    color = LIGHT["vermillion"] if is_bad else LIGHT["muted"]
    ax.annotate(
        text, (1, row), (7, 0), xycoords=ax.get_yaxis_transform(), color=color, annotation_clip=False, **style
    )


def _decades(ax: Axes, longest: float, has_bad: bool) -> None:
    """Ticks at powers of ten on both sides of 0, few enough to be read."""
    top = max(1, int(np.ceil(np.log10(max(longest, 1.0)) - 1e-9)))
    step = 1 if top <= 3 and not has_bad else 2 if top <= 5 else 3
    powers = [10.0**power for power in range(top, -1, -step)]
    least = -(10.0**top) if has_bad else -0.5
    ax.set_xlim(least, 10.0**top * 1.15)
    ax.xaxis.set_major_locator(FixedLocator([*(-power for power in powers if has_bad), 0.0, *powers]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tables.grouped(value)))


def examples(view: RunView) -> list[tuple[str, list[Example]]]:
    """Per task, the examples of the method that the run is about, or else of the first that has any."""
    parts = [
        view.part("retrieval"),
        *(mapping(mapping(mode).get("retrieval")) for mode in view.part("modes").values()),
    ]
    rows = next((found for part in parts if (found := sequence(part.get("examples")))), [])
    by_task: dict[str, list[Example]] = {}
    for row in map(mapping, rows):
        task = str(row.get("task", ""))
        by_task.setdefault(task, []).append(_example(task, row))
    return list(by_task.items())


def _example(task: str, row: Mapping[str, Any]) -> Example:
    score, retrieved = number(row.get("score")), str(row.get("retrieved", ""))
    return Example(
        str(row.get("prompt", "")),
        retrieved,
        retrieved == task,
        str(row.get("answer", "")),
        [str(reference) for reference in sequence(row.get("references"))],
        score >= RIGHT_FROM,
        "" if score in (0, 1) else tables.percent(100 * score, 0),
    )
