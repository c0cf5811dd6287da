"""docs/studies.md and its picture, from the results of a study; a test compares the tables.

python -m trace_dist.studies.page docs/results docs/studies.md docs/studies.png
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from trace_dist.benchmarks.document import Result, Sections, grid, render, with_origin
from trace_dist.report.plots import label_ends
from trace_dist.report.theme import LIGHT
from trace_dist.studies.claims import claims, nats, percent
from trace_dist.utils.files import read_json, write_text

RESULT = "study_small_to_large.json"
MISSING = "–"  # noqa: RUF001


def progress_line(result: Result) -> str:
    """How far the study is, with its origin."""
    study, train = result["settings"]["study"], result["settings"]["train"]
    seeds = max((cell["seeds"] for cell in result["cells"]), default=0)
    far = "The study is complete." if result["complete"] else (
        f"**The study is not complete**: {result['cells_missing']} of its cells (an arm, a task, a density) lack trainings. "
        "What is not decided here is undecided because the time ran out."
    )  # fmt: skip
    text = (
        f"{far} So far {result['trainings']} trainings of {train['steps']} steps of {train['batch_size']} examples, "
        f"{result['hours']:.1f} hours; {len(result['bases'])} tasks; at most {seeds} seed(s). Rates are chosen on "
        f"{study['validation']} held-out training examples."
    )
    return with_origin(result, text)


def claims_table(result: Result) -> str:
    """Each claim, what the study says, and the numbers."""
    rows = [[claim.text, claim.verdict, claim.evidence] for claim in claims(result)]
    return _text_grid(["claim", "the study says", "evidence (95 % intervals)"], rows)


def losses_table(result: Result) -> str:
    """Loss with accuracy by arm and density, per task."""
    tasks = list(result["bases"])
    cells = {(cell["arm"], cell["density"], cell["task"]): cell for cell in result["cells"] if cell["seeds"]}
    kinds = sorted(
        {(density, arm) for arm, density, _ in cells},
        key=lambda kind: (kind[0] or 1.0, _place(result, kind[1])),
    )
    rows = [
        [
            "the base",
            "",
            *(f"{base['loss']:.3f} ({base['accuracy']:.0f})" for base in result["bases"].values()),
        ]
    ]
    for density, arm in kinds:
        entries = [cell["entries"] for key, cell in cells.items() if key[:2] == (arm, density)]
        row = [result["arms"][arm]["label"], f"{max(entries):,}"]
        for task in tasks:
            cell = cells.get((arm, density, task))
            mark = "" if cell is None or cell["bracketed"] else " *"
            row.append(MISSING if cell is None else f"{cell['loss']:.3f} ({cell['accuracy']:.0f}){mark}")
        rows.append(row)
    return grid(["loss, nats per answer token (exact match, %)", "entries", *tasks], rows) + "\n"


def differences_table(result: Result) -> str:
    """Paired differences to the reference at equal density."""
    reference = result["settings"]["study"]["reference"]
    tasks = list(result["bases"])
    rows = []
    for row in result["differences"]:
        if row["other"] == reference and row["density"] == row["other_density"]:
            by_task = {each["task"]: each for each in row["tasks"]}
            cells = [_difference(by_task.get(task)) for task in tasks]
            average = MISSING if row["mean"] is None else nats(row["mean"])
            rows.append(
                [f"{result['arms'][row['arm']]['label']}, {percent(row['density'])}", average, *cells]
            )
    return grid([f"loss minus that of {reference}, nats", "mean", *tasks], rows) + "\n"


def _difference(row: Result | None) -> str:
    if row is None:
        return MISSING
    return nats(row) + ("" if row["tuned"] else " *")


def text_table(result: Result) -> str:
    """Rise of the loss on general text, mean over tasks, beside the loss on the tasks."""
    rows = []
    for arm, density, cells in _by_kind(result):
        numbers = [
            f"{mean(cell['loss'] for cell in cells):.3f}",
            f"{mean(cell['text_rise'] for cell in cells):+.3f}",
        ]
        rows.append([f"{result['arms'][arm]['label']}, {percent(density)}", str(len(cells)), *numbers])
    return grid(["", "tasks", "loss", "rise of general text's loss, nats per token"], rows) + "\n"


def rates_table(result: Result) -> str:
    """Best rates and what the rule says of them."""
    rows = []
    for arm, density, cells in _by_kind(result):
        tuned = [cell for cell in cells if cell["bracketed"]]
        if not tuned:
            continue
        rates, products = (
            [cell["lr"] for cell in tuned],
            [cell["product"] for cell in tuned if cell["product"]],
        )
        shown = [f"{min(rates):g} to {max(rates):g}"]
        shown.append(f"{min(products):.1f} to {max(products):.1f}" if products else MISSING)
        shown.append(f"{mean(len(cell['rates']) for cell in tuned):.1f}")
        rows.append([f"{result['arms'][arm]['label']}, {percent(density)}", str(len(tuned)), *shown])
    table = grid(["", "tasks tuned", "best rates", "rate times sum of gradients", "rates tried"], rows)
    return f"{table}\n\n{_rule(result)}\n"


def _rule(result: Result) -> str:
    """How well the rule predicts what it was not fitted on."""
    rule, tasks = result["rule"], list(result["bases"])
    later = [row["over_fitted"] for row in rule["checked"] if row["task"] not in tasks[:2]]
    fitted = f"The product was fitted on {rule['cells']} cells of the first two tasks: {rule['product']:.1f}."
    if not later:
        return f"{fitted} No other task is tuned by now, so it is unchecked."
    near = sum(10**-0.75 < each < 10**0.75 for each in later)
    far = max(max(each, 1 / each) for each in later)
    return (
        f"{fitted} On other tasks the best rate was within one step of the grid of the predicted one in {near} of {len(later)} "
        f"cells; the median factor was {median(max(each, 1 / each) for each in later):.1f}, the largest {far:.1f}."
    )


def costs_table(result: Result) -> str:
    """What masks cost beside the training that they guide."""
    rows = [
        [
            result["arms"][row["arm"]]["label"],
            *(f"{row[key] / 1e12:.2f}" for key in ("probe_flops", "train_flops")),
            f"{100 * row['flops_share']:.0f}",
            *(f"{row[key]:.0f}" for key in ("probe_s", "train_s")),
            f"{100 * row['time_share']:.0f}",
        ]
        for row in result["costs"]
    ]
    head = [
        "",
        "masks, TFLOP",
        "a training, TFLOP",
        "share, %",
        "masks, s",
        "a training, s",
        "share of time, %",
    ]
    return grid(head, rows) + "\n"


def _by_kind(result: Result) -> list[tuple[str, float | None, list[Result]]]:
    """Cells of an arm and a density, over tasks."""
    kinds: dict[tuple[str, float | None], list[Result]] = {}
    for cell in result["cells"]:
        if cell["seeds"]:
            kinds.setdefault((cell["arm"], cell["density"]), []).append(cell)
    order = sorted(kinds, key=lambda kind: (kind[1] or 1.0, _place(result, kind[0])))
    return [(arm, density, kinds[arm, density]) for arm, density in order]


def _place(result: Result, arm: str) -> int:
    return list(result["arms"]).index(arm)


def _text_grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


SECTIONS: Sections = {
    "progress": ((RESULT,), progress_line),
    "claims": ((RESULT,), claims_table),
    "losses": ((RESULT,), losses_table),
    "differences": ((RESULT,), differences_table),
    "text": ((RESULT,), text_table),
    "rates": ((RESULT,), rates_table),
    "costs": ((RESULT,), costs_table),
}
"""Section of docs/studies.md -> its result files and its table."""


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
        quality.yaxis.set_minor_formatter(NullFormatter())
        forgetting.set_xscale("log")
        forgetting.xaxis.set_minor_formatter(NullFormatter())
        label_ends(quality, ends, gap=0.06, longest=34)
        where = f"mean of {len(tasks)} task(s): {', '.join(tasks)}"
        quality.set_title("answer loss, nats per token", loc="left", fontsize=10)
        forgetting.set_title("rise of general text's loss, nats per token", loc="left", fontsize=10)
        quality.set_xlabel(f"trained entries; {where}")
        forgetting.set_xlabel("answer loss, nats per token")
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
    """Tasks on which the arms of the study's first stage are known at its first density."""
    first = result["settings"]["study"]["stages"][0]
    known = {(cell["task"], cell["arm"], cell["density"]) for cell in result["cells"] if cell["seeds"]}
    wanted = [(arm, first["densities"][0]) for arm in first["arms"]]
    return [task for task in result["bases"] if all((task, *kind) in known for kind in wanted)]


def _points(result: Result, arm: str, tasks: Sequence[str]) -> list[tuple[float, float, float]]:
    """Entries, loss and rise of general text's loss at each density that is known on all tasks, rising."""
    found = []
    for name, _, cells in _by_kind(result):
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


if __name__ == "__main__":
    results, page = Path(sys.argv[1]), Path(sys.argv[2])
    write_text(page, render(page.read_text(encoding="utf-8"), results, SECTIONS))
    draw(read_json(results / RESULT), Path(sys.argv[3]))
