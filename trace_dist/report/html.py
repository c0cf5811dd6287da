"""`report.html`: one self-contained page about a run, readable offline, on a phone and on paper.

Matrices are HTML tables (`heat`), curves and bars inline SVG drawn by matplotlib (`plots`); both take their
colours from CSS variables and so follow the reader's light or dark scheme. There is no script, and a content
security policy forbids the page to load anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from trace_dist.report import heat, plots, retrieval, tables, theme, validation_plot
from trace_dist.report.narrative import narrate
from trace_dist.report.results import RunView, mapping, number, parse_results, sequence
from trace_dist.utils.files import write_text

TASK_COLUMNS = ("just trained", "final", "majority answer", "train-test overlap", "delta on disk")


@dataclass(frozen=True)
class Bar:
    """A line of a bar list: `share` in [0, 1] of the longest."""

    name: str
    share: float
    text: str


def write_report(results: Mapping[str, Any], out: str | Path) -> Path:
    """Write the page for `results` to the file `out` (its folder is created) and return its path.

    Raises:
        ValueError: `results` lacks "tasks" or "modes", a matrix does not fit the tasks, or the file cannot be written; an
            older page is then still there.
    """
    view = parse_results(results)
    out = Path(out)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    with theme.theme():
        page = environment.get_template("template.html.j2").render(_context(view))
    write_text(out, page)
    return out


def _context(view: RunView) -> dict[str, Any]:
    """Everything the template shows; an empty value leaves its section out."""
    forgetting_height = 70 + 46 * len(view.methods)
    return {
        "view": view,
        "light": theme.LIGHT,
        "dark": theme.DARK,
        "tiles": tables.headline(view),
        "story": narrate(view),
        "columns": tables.COLUMNS,
        "rows": [
            (
                method,
                theme.css_color(theme.method_color(method.colour, position)),
                tables.method_cells(view, method),
            )
            for position, method in enumerate(view.methods)
        ],
        "matrices": [heat.accuracy_heat(view, method) for method in view.methods],
        "has_many_tasks": len(view.tasks) > heat.MANY_TASKS,
        "forgetting": _figure(
            360, forgetting_height, "Learned and kept", plots.draw_forgetting, view.methods
        ),
        "task_columns": TASK_COLUMNS,
        "task_rows": _task_rows(view),
        "general": _general(view),
        "text_rows": _text(view),
        "masks": _masks(view),
        "losses": _losses(view),
        "looks": _looks(view),
        "memory": _memory(view),
        "specificity": heat.specificity_heat(view),
        "learning": tables.learning_rows(view),
        "retrieval_facts": retrieval.facts(view),
        "confusion": heat.confusion_heat(view),
        "margins": _strips(
            "Margins of retrieval, per task",
            retrieval.margins(view),
            ("right", "wrong"),
            "nats from the best other task",
        ),
        "typicality": _strips(
            "Density above the threshold of rejection, per task",
            retrieval.typicality(view),
            ("kept", "rejected"),
            "nats above the threshold",
        ),
        "reject_rate": _if_known(tables.percent(100 * retrieval.reject_rate(view), 0)),
        "examples": retrieval.examples(view),
        "overlaps": heat.overlap_heats(view),
        "isolation": heat.isolation(view),
        "deltas": _bars(view.part("delta_bytes"), tables.size),
        "bytes_per_entry": _if_known(tables.fixed(number(view.raw.get("bytes_per_entry")))),
        "stages": _bars(mapping(view.part("run_info").get("stages")), tables.duration),
        "seconds": _if_known(tables.duration(number(view.part("run_info").get("seconds")))),
        "facts": _facts(view),
        "config": _config(view),
    }


def _figure(width_px: int, height_px: int, title: str, draw: Callable[..., object], *args: object) -> Markup:
    """Inline SVG of one chart drawn by `draw(ax, *args)`."""
    fig = theme.new_figure(width_px, height_px)
    draw(fig.subplots(), *args)
    return Markup(theme.to_svg(fig, title))


def _task_rows(view: RunView) -> list[tuple[str, list[str]]]:
    """One row per task, in the order of `TASK_COLUMNS`."""
    baselines, deltas, hero = view.part("baselines"), view.part("delta_bytes"), view.hero

    def baseline(key: str, index: int) -> str:
        values = sequence(baselines.get(key))
        return tables.fixed(number(values[index])) if index < len(values) else tables.MISSING

    return [
        (
            task,
            [
                tables.fixed(float(hero.just_trained[index])),
                tables.fixed(float(hero.final[index])),
                baseline("majority", index),
                baseline("train_test_overlap", index),
                tables.size(number(deltas.get(task))),
            ],
        )
        for index, task in enumerate(view.tasks)
    ]


def _general(view: RunView) -> list[tuple[str, Markup]]:
    return [
        (
            name,
            _figure(
                340, 220, f"General ability on {name} after each stage", plots.draw_general, view, column
            ),
        )
        for column, name in enumerate(view.general_sets)
        if any(np.isfinite(method.general[:, column]).any() for method in view.methods)
    ]


def _text(view: RunView) -> list[tuple[str, list[str]]]:
    """Per method and text set: bits per byte of the base, then after the last task."""
    rows = []
    for method in view.methods:
        for text_set, values in mapping(
            mapping(view.part("modes")[method.name]).get("bits_per_byte")
        ).items():
            curve = [number(value) for value in sequence(values)]
            if len(curve) > 1:
                cells = [
                    tables.fixed(curve[0], 3),
                    tables.fixed(curve[-1], 3),
                    tables.signed(curve[-1] - curve[0], 3),
                ]
                rows.append((method.label, [str(text_set), *cells]))
    return rows


def _losses(view: RunView) -> list[tuple[str, Markup]]:
    return [
        (task, _figure(340, 220, f"Training loss on {task}", plots.draw_losses, view, task))
        for task in view.tasks
        if any(task in method.losses for method in view.methods)
    ]


def _looks(view: RunView) -> list[tuple[str, Markup]]:
    """Per task the validation loss, and the score where it was measured."""
    charts = []
    for task in view.tasks:
        if any(task in method.looks for method in view.methods):
            draw = validation_plot.draw_looks
            charts.append((task, _figure(340, 220, f"Validation loss on {task}", draw, view, task)))
            if validation_plot.has_scores(view, task):
                title, column = f"Validation score on {task}", validation_plot.SCORE
                charts.append((f"{task}, score", _figure(340, 220, title, draw, view, task, column)))
    return charts


def _masks(view: RunView) -> list[tuple[str, Markup]]:
    """Per task, proxy beside target (whichever exist), all on one colour scale."""
    ceiling = plots.mask_ceiling([mask for by_task in view.masks.values() for mask in by_task.values()])
    out = []
    for task in view.tasks:
        pair = {model: by_task[task] for model, by_task in view.masks.items() if task in by_task}
        if pair:
            fig = theme.new_figure(340, 270)
            plots.draw_mask_row(fig, pair, ceiling)
            out.append((task, Markup(theme.to_svg(fig, f"Mask density for {task}"))))
    return out


def _strips(title: str, strips: list[retrieval.Strip], words: tuple[str, str], unit: str) -> Markup | None:
    if not strips:
        return None
    height = 70 + retrieval.MARKS_PX * len(strips)
    return _figure(360, height, title, retrieval.draw_strips, strips, words, unit)


def _memory(view: RunView) -> dict[str, Any] | None:
    memory = view.part("memory")
    categories = {str(kind): mapping(parts) for kind, parts in mapping(memory.get("categories")).items()}
    names = list(dict.fromkeys(str(name) for parts in categories.values() for name in parts))
    if not names:
        return None
    peaks = [tables.fixed(number(mapping(memory.get("peak_rss_gib")).get(kind)), 2) for kind in categories]
    rows = [
        (
            plots.CATEGORY_LABELS.get(name, name),
            theme.css_color(theme.category_color(name)),
            [tables.fixed(number(parts.get(name)), 2) for parts in categories.values()],
        )
        for name in names
    ]
    height = 80 + 85 * len(categories)
    return {
        "figure": _figure(360, height, "Model states in bytes per parameter", plots.draw_memory, memory),
        "kinds": list(categories),
        "dtype": memory.get("dtype"),
        "rows": rows,
        "peaks": peaks if any(_if_known(peak) for peak in peaks) else [],
    }


def _bars(values: Mapping[str, Any], write: Callable[[float], str]) -> list[Bar]:
    numbers = {str(name): number(value) for name, value in values.items()}
    known = {name: value for name, value in numbers.items() if not math.isnan(value)}
    longest = max(known.values(), default=0.0) or 1.0
    return [Bar(name, max(0.0, value / longest), write(value)) for name, value in known.items()]


def _facts(view: RunView) -> list[tuple[str, str]]:
    """Where, when and with what the run was made."""
    run_info, meta_info, target = (
        view.part("run_info"),
        view.part("meta_info"),
        mapping(view.part("config").get("target")),
    )
    pairs = [
        ("date", str(run_info.get("date") or "")[:16].replace("T", " ")),
        ("commit", ", ".join(view.commits)),
        ("hardware", meta_info.get("hardware")),
        ("launcher", run_info.get("launcher")),
        ("backend", run_info.get("backend")),
        ("ranks", run_info.get("num_ranks")),
        ("dtype", target.get("dtype")),
        *mapping(meta_info.get("versions")).items(),
    ]
    return [(str(name), str(value)) for name, value in pairs if value not in (None, "")]


def _config(view: RunView) -> str:
    config: Any = {}
    # One that is nested so deep is none.
    with suppress(RecursionError):
        config = _plain(view.part("config"))
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else ""


def _plain(value: Any) -> Any:
    """`value` in types that YAML writes as they are."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


def _if_known(text: str) -> str:
    return "" if text == tables.MISSING else text
