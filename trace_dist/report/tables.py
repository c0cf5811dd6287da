"""Numbers as people read them, the comparison of methods, and the headline tiles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from trace_dist.report.results import MethodView, RunView, mapping, mean, number, parse_results

MISSING = "–"  # noqa: RUF001, an en dash is what a typesetter puts in an empty cell


def fixed(value: float, digits: int = 1) -> str:
    """`value` with `digits` decimals and a true minus sign; a dash for NaN; never "-0.0"."""
    if math.isnan(value):
        return MISSING
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def percent(value: float, digits: int = 1) -> str:
    """`value` in percent with its unit."""
    return MISSING if math.isnan(value) else f"{fixed(value, digits)}\N{NO-BREAK SPACE}%"


def share_digits(value: float) -> int:
    """Decimals of a density in percent: one, and more where it would read as nothing, or as another one."""
    return next((digits for digits in range(1, 9) if abs(round(value, digits) - value) <= value / 20), 1)


def share(fraction: float) -> str:
    """A density in percent with its unit: 5.0 %, 0.01 %."""
    return percent(100 * fraction, share_digits(100 * fraction))


def rate(value: float) -> str:
    """A learning rate with two digits at most: 3e-3, 2.5e-4."""
    if math.isnan(value):
        return MISSING
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def signed(value: float, digits: int = 1) -> str:
    """A change: a rise carries its plus."""
    text = fixed(value, digits)
    return f"+{text}" if value > 0 and float(text) > 0 else text


def grouped(value: float) -> str:
    """A whole number, thousands apart, with a true minus sign: −1 000."""
    return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}").replace("-", "\N{MINUS SIGN}")


def count(value: float) -> str:
    """A number of things: 860, 43.0 k, 1.2 M, 70.6 B."""
    return _scaled(value, 1000.0, ("", " k", " M", " B", " T"))


def size(num_bytes: float) -> str:
    """A number of bytes: 512 B, 253.9 KiB, 1.2 GiB."""
    return _scaled(num_bytes, 1024.0, (" B", " KiB", " MiB", " GiB", " TiB"))


def _scaled(value: float, base: float, suffixes: tuple[str, ...]) -> str:
    if math.isnan(value):
        return MISSING
    exponent = 0
    while abs(value) >= base and exponent < len(suffixes) - 1:
        value /= base
        exponent += 1
    return f"{value:.{1 if exponent else 0}f}{suffixes[exponent]}"


def duration(seconds: float) -> str:
    """Wall time: 0.4 s, 42 s, 5 min 10 s, 2 h 05 min."""
    if math.isnan(seconds):
        return MISSING
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def shorten(text: str, length: int) -> str:
    """`text` cut to `length` characters in its middle: names of a family differ at either end."""
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[-tail:]}"


def shorten_all(names: Sequence[str], length: int) -> list[str]:
    """The names cut to `length`; those that would then look alike are numbered, from 1."""
    short = [shorten(name, length) for name in names]
    return [
        shorten(f"{position} {name}", length) if short.count(short[position - 1]) > 1 else short[position - 1]
        for position, name in enumerate(names, start=1)
    ]


@dataclass(frozen=True)
class Column:
    """A column of the comparison of methods: its head, its unit, what it means."""

    head: str
    unit: str
    meaning: str


COLUMNS = (
    Column("just trained", "%", "mean score of the tasks, each right after its own training"),
    Column("final average", "%", "mean score over all tasks at the end of the sequence"),
    Column("forgetting", "points", "mean fall of a task's score from its best to the end"),
    Column("general", "points", "change on the general sets from the base model to the end"),
    Column("peak rate", "lr", "peak learning rate of its training"),
    Column("density", "%", "share of the maskable entries that is trained"),
    Column("states", "B/param", "bytes of model states per parameter, all ranks together"),
)


def method_cells(view: RunView, method: MethodView) -> list[str]:
    """The row of `method`, in the order of `COLUMNS`."""
    density = 100 * method.stat("density")
    return [
        fixed(mean(method.just_trained)),
        fixed(final_average(method)),
        fixed(method.stat("forgetting")),
        signed(method.stat("general_delta")),
        rate(method.stat("lr")),
        fixed(density, share_digits(density)),
        fixed(view.bytes_per_param(method.name), 2),
    ]


def learning_rows(view: RunView) -> list[tuple[str, list[str]]]:
    """Of each probed task the held-out loss before and after the probe, and by chance; none where it was not measured."""
    found = mapping(view.part("specificity").get("learning"))
    return [
        (str(task), [fixed(number(mapping(each).get(key)), 2) for key in ("before", "after", "chance")])
        for task, each in found.items()
    ]


def final_average(method: MethodView) -> float:
    """Reported final average accuracy in percent, else the mean of the last measured row."""
    reported = method.stat("average_accuracy")
    return mean(method.final) if math.isnan(reported) else reported


def summary_table(results: Mapping[str, Any]) -> Table:
    """The comparison of methods for the terminal: one row per method, the method the run is about in bold.

    Raises:
        ValueError: `results` lacks "tasks" or "modes".
    """
    view = parse_results(results)
    plural = "task" if len(view.tasks) == 1 else "tasks in sequence"
    table = Table(
        title=f"{len(view.tasks)} {plural}",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
    )
    table.add_column("method", overflow="fold", min_width=12)
    for column in COLUMNS:
        head = column.head.replace(" ", "\n")
        table.add_column(
            f"{head}\n[dim]{column.unit}[/dim]", justify="right", vertical="bottom", no_wrap=True
        )
    for method in view.methods:
        table.add_row(
            Text(method.label), *method_cells(view, method), style="bold" if method is view.hero else ""
        )
    return table


@dataclass(frozen=True)
class Tile:
    """One headline number, what it counts, and what to compare it with."""

    value: str
    unit: str
    label: str
    note: str


def headline(view: RunView) -> list[Tile]:
    """The four or five numbers that a reader takes away; a number that the run lacks has no tile."""
    hero, full, retrieval = view.hero, view.method("full"), view.part("retrieval")
    beside: dict[str, str] = {}
    if full is not None and full is not hero:
        beside = {
            "average": f"{full.label} {percent(final_average(full))}",
            "forgetting": f"{full.label} {fixed(full.stat('forgetting'))}",
            "states": f"{full.label} {fixed(view.bytes_per_param('full'), 2)}",
        }
    bound, density = number(retrieval.get("error_bound")), 100 * hero.stat("density")
    candidates = [
        (final_average(hero), 1, "%", f"final average, {hero.label}", beside.get("average", "")),
        (hero.stat("forgetting"), 1, "points", "forgetting", beside.get("forgetting", "")),
        (density, share_digits(density), "%", "entries trained", f"{count(hero.stat('trainable'))} per task"),
        (view.bytes_per_param(hero.name), 2, "B/param", "model states", beside.get("states", "")),
        (
            number(retrieval.get("accuracy")),
            1,
            "%",
            "tasks retrieved",
            f"another task at most {percent(bound)}",
        ),
    ]
    return [
        Tile(fixed(value, digits), unit, label, "" if MISSING in note else note)
        for value, digits, unit, label, note in candidates
        if not math.isnan(value)
    ]
