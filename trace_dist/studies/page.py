"""Pages of the studies small-to-large, each with its picture, from the results beside it; a test compares the tables.

python -m trace_dist.studies.page docs/studies.md
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median

from trace_dist.benchmarks.document import Result, Sections, grid, render, with_origin
from trace_dist.studies.cells import by_kind, place
from trace_dist.studies.claims import claims, nats, percent
from trace_dist.studies.one_model_page import RESULT as ONE_MODEL
from trace_dist.studies.one_model_page import one_model_table
from trace_dist.studies.picture import draw
from trace_dist.utils.files import read_json, write_text

RESULT = "study_small_to_large.json"
TWO_WIDTHS = "study_two_widths.json"
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
        key=lambda kind: (kind[0] or 1.0, place(result, kind[1])),
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


def enough_table(result: Result) -> str:
    """How many tasks each density is enough for."""
    rows = []
    for arm in dict.fromkeys(row["arm"] for row in result["enough"]):
        found = [row["density"] for row in result["enough"] if row["arm"] == arm]
        counts = [str(found.count(density)) for density in result["settings"]["densities"]]
        rows.append([result["arms"][arm]["label"], *counts])
    if not rows:
        return "No arm is tuned at all densities of a task by now.\n"
    heads = [f"{percent(density)} is enough" for density in result["settings"]["densities"]]
    return grid(["tasks on which", *heads], rows) + "\n"


def text_table(result: Result) -> str:
    """Rise of the loss on general text, mean over tasks, beside the loss on the tasks."""
    rows = []
    for arm, density, cells in by_kind(result):
        numbers = [
            f"{mean(cell['loss'] for cell in cells):.3f}",
            f"{mean(cell['text_rise'] for cell in cells):+.3f}",
        ]
        rows.append([f"{result['arms'][arm]['label']}, {percent(density)}", str(len(cells)), *numbers])
    return grid(["", "tasks", "loss", "rise of general text's loss, nats per token"], rows) + "\n"


def rates_table(result: Result) -> str:
    """Best rates and what the rule says of them."""
    rows = []
    for arm, density, cells in by_kind(result):
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


def _text_grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def sections_of(result: str) -> Sections:
    """Section of a page -> its result file, the study's, and its table."""
    tables = {
        "progress": progress_line,
        "claims": claims_table,
        "losses": losses_table,
        "differences": differences_table,
        "enough": enough_table,
        "text": text_table,
        "rates": rates_table,
        "costs": costs_table,
    }
    return {section: ((result,), table) for section, table in tables.items()}


PAGES: dict[str, tuple[str, Sections]] = {
    "studies.md": (RESULT, {**sections_of(RESULT), "one-model": ((ONE_MODEL,), one_model_table)}),
    "two-widths.md": (TWO_WIDTHS, sections_of(TWO_WIDTHS)),
}
"""Page in docs -> the result file of its picture, and its sections."""


if __name__ == "__main__":
    page = Path(sys.argv[1])
    file, sections = PAGES[page.name]
    write_text(page, render(page.read_text(encoding="utf-8"), page.parent / "results", sections))
    draw(read_json(page.parent / "results" / file), page.with_suffix(".png"))
