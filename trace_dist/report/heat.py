"""Heat-maps as HTML tables: accuracy per method, cosine between tasks, retrieval confusion.

A table can be read out, copied and scrolled on a phone; the tint of a cell is a CSS variable in [0, 1] that
the page mixes into the reader's colour scheme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trace_dist.report import tables, theme
from trace_dist.report.results import Array, MethodView, RunView, mapping, matrix, mean, sequence

MANY_TASKS = 5  # with more, matrices get wider cards, upright names and no decimals
_NAME_LENGTH = 14
_FADED_BELOW = 10  # percent; muted text is legible on tints below it alone
_ISOLATIONS = {
    "shared": "a task may train what earlier tasks trained",
    "exclusive": "a task may not train what earlier tasks trained",
    "soft": "a task takes smaller steps where earlier tasks trained",
}


@dataclass(frozen=True)
class Cell:
    """A tinted cell: its text, its tint in [-1, 1], its CSS classes."""

    text: str
    tint: float
    classes: str = ""

    @property
    def css(self) -> str:
        strong = " strong" if self.tint >= theme.STRONG_TINT else ""
        return (self.classes + strong + (" negative" if self.tint < 0 else "")).strip()


@dataclass(frozen=True)
class Heat:
    """A heat-map. Long names are cut; the whole name shows on hover and in the table of tasks."""

    title: str
    note: str
    corner: str
    column_names: Sequence[str]
    rows: Sequence[tuple[str, str, Sequence[Cell]]]  # (short name, whole name, cells)
    color: str = "var(--ink)"

    @property
    def columns(self) -> list[tuple[str, str]]:
        """(short, whole) names of the columns."""
        short = tables.shorten_all(self.column_names, _NAME_LENGTH)
        return list(zip(short, self.column_names, strict=True))

    @property
    def is_tall(self) -> bool:
        """Column names stand upright."""
        return len(self.column_names) > MANY_TASKS or any(len(name) > 11 for name in self.column_names)


def accuracy_heat(view: RunView, method: MethodView) -> Heat:
    """The accuracy matrix of a method in percent; see [Note: the accuracy matrix]."""
    short = ["base", *(f"+ {name}" for name in tables.shorten_all(view.tasks, _NAME_LENGTH))]
    whole = ["untouched base model", *(f"after training on {name}" for name in view.tasks)]
    rows = []
    for stage, scores in enumerate(method.scores):
        cells = [_score_cell(float(score), stage, task, len(view.tasks)) for task, score in enumerate(scores)]
        rows.append((short[stage], whole[stage], cells))
    color = theme.css_color(theme.method_color(method.colour, view.methods.index(method)))
    note = f"final average {tables.percent(tables.final_average(method))}"
    return Heat(method.label, note, "stage", view.tasks, rows, color)


def _score_cell(score: float, stage: int, task: int, num_tasks: int) -> Cell:
    digits = 0 if score in (0, 100) or num_tasks > MANY_TASKS else 1
    is_faded = stage <= task and not score > _FADED_BELOW  # a later task, of which nothing is known yet
    classes = "trained" if stage == task + 1 else "future" if is_faded else ""
    return Cell(tables.fixed(score, digits), _tint(score / 100), classes)


def specificity_heat(view: RunView) -> Heat | None:
    """Cosine between the tasks' updates, and each task's specificity; None if not measured."""
    part = view.part("specificity")
    if not sequence(part.get("cosine")):
        return None
    names = [str(task) for task in sequence(part.get("tasks"))] or view.tasks
    cosine = matrix(part["cosine"], len(names), len(names), "results: specificity.cosine")
    specific = matrix([part.get("specificity")], 1, len(names), "results: specificity.specificity")[0]
    rows = []
    for i, short in enumerate(tables.shorten_all(names, _NAME_LENGTH)):
        cells = [
            Cell(
                tables.fixed(float(value), 2), 0.0 if i == j else _tint(float(value)), "own" if i == j else ""
            )
            for j, value in enumerate(cosine[i])
        ]
        rows.append((short, names[i], [*cells, Cell(tables.fixed(float(specific[i]), 2), 0.0, "result")]))
    return Heat("Cosine of the tasks' updates", "", "task", [*names, "specificity"], rows)


def confusion_heat(view: RunView) -> Heat | None:
    """Prompts of each task (row) by what answered them: a task's delta, or the base; tinted by the share of the row."""
    part = view.part("retrieval")
    if not sequence(part.get("confusion")):
        return None
    names = [str(task) for task in sequence(part.get("tasks"))] or view.tasks
    columns = [str(name) for name in sequence(part.get("columns"))] or names
    confusion = matrix(part["confusion"], len(names), len(columns), "results: retrieval.confusion")
    totals = np.maximum(np.nansum(confusion, axis=1), 1.0)
    rows = []
    for i, short in enumerate(tables.shorten_all(names, _NAME_LENGTH)):
        cells = [Cell(tables.fixed(float(n), 0), _tint(float(n / totals[i]))) for n in confusion[i]]
        rows.append((short, names[i], cells))
    return Heat("Prompts by task", "", "true ↓ retrieved →", columns, rows)


def overlap_heats(view: RunView) -> list[Heat]:
    """Per method, the share of each task's entries (row) that another task's mask (column) holds too, in percent.

    Methods that train the same masks share one heat-map.
    """
    alike: dict[tuple[tuple[str, ...], bytes], list[MethodView]] = {}
    for method in view.methods:
        names, shares = _overlap(view, method)
        if names:
            alike.setdefault((tuple(names), shares.tobytes()), []).append(method)
    return [_overlap_heat(*_overlap(view, methods[0]), methods) for methods in alike.values()]


def _overlap(view: RunView, method: MethodView) -> tuple[list[str], Array]:
    """T tasks and [T, T] shares; none where a method has none."""
    found = mapping(view.part("overlap").get(method.name))
    names = [str(task) for task in sequence(found.get("tasks"))]
    where = f"results: overlap.{method.name}.matrix"
    return names, matrix(found.get("matrix") if names else None, len(names), len(names), where)


def _overlap_heat(names: list[str], shares: Array, methods: Sequence[MethodView]) -> Heat:
    rows = []
    for i, short in enumerate(tables.shorten_all(names, _NAME_LENGTH)):
        cells = [
            Cell(
                tables.fixed(100 * float(share), 0),
                0.0 if i == j else _tint(float(share)),
                "own" if i == j else "",
            )
            for j, share in enumerate(shares[i])
        ]
        rows.append((short, names[i], cells))
    title = "Shared entries: " + ", ".join(method.label for method in methods)
    return Heat(title, _overlap_note(methods, shares), "task", names, rows)


def _overlap_note(methods: Sequence[MethodView], shares: Array) -> str:
    """What the numbers are, their mean, and what independent masks of this size would share."""
    others = mean(shares[~np.eye(len(shares), dtype=bool)])
    if math.isnan(others):
        return "% of the row's task"
    # a union of all tasks' masks says nothing of the masks of single tasks
    density = min((d for method in methods if not math.isnan(d := method.stat("density"))), default=math.nan)
    chance = "" if math.isnan(density) else f"; {tables.share(density)} by chance"
    return f"% of the row's task; {tables.percent(100 * others)} on average{chance}"


def isolation(view: RunView) -> str:
    """How tasks kept off each other's entries, as the configuration says; empty where it does not."""
    kind = str(mapping(view.part("config").get("mask")).get("isolation") or "")
    return f"{kind}: {_ISOLATIONS[kind]}" if kind in _ISOLATIONS else kind


def _tint(value: float) -> float:
    return 0.0 if math.isnan(value) else max(-1.0, min(1.0, value))
