"""docs/transfer.md and its picture, from the results of the study of composition; a test compares the table.

python -m trace_dist.studies.transfer_page docs/results docs/transfer.md docs/transfer.png
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from trace_dist.benchmarks.document import Result, Sections, grid, render, with_origin
from trace_dist.report.plots import plain_numbers
from trace_dist.report.theme import LIGHT, new_figure, theme
from trace_dist.studies.transfer_summary import summary
from trace_dist.utils.files import read_json, write_text

RESULT = "transfer.json"
ARMS = {"base": ("from the base", "vermillion"), "composed": ("with composition", "blue")}
LOSSES = ("base_loss", "composed_loss", "half_loss")
_PANEL_PX, _HEIGHT_PX, _DPI = 400, 400, 108


def summary_table(result: Result) -> str:
    """Of each new task, and of each group."""
    rows = []
    for group, found in summary(result["records"]).items():
        for name, each in [*found["tasks"].items(), (f"**{group}, all**", found["all"])]:
            rows.append([
                name,
                f"{each['base_steps'][0]:.0f}",
                f"{each['composed_steps'][0]:.0f}",
                _spread(each["share"], 2),
                f"{each['reached']} of {each['trainings']}",
                *(f"{each[key][0]:.3f}" if key in each else "-" for key in LOSSES),
                _spread(each["composed_above"], 1),
                f"{each['used']} of {each['trainings']}",
            ])  # fmt: skip
    heads = [
        "new task", "steps from the base", "steps with composition", "share of the steps", "loss reached",
        "test loss from the base", "with composition", "in half of the steps",
        "composition above base, %", "earlier deltas taken",
    ]  # fmt: skip
    return with_origin(result, grid(heads, rows))


def _spread(values: Sequence[float], digits: int) -> str:
    """A mean with its 95 % interval, where there is one."""
    mean, *ends = (f"{value:.{digits}f}" for value in values)
    return mean if not ends else f"{mean} [{', '.join(ends)}]"


SECTIONS: Sections = {"transfer": ((RESULT,), summary_table)}
"""Section of docs/transfer.md -> its result file and its table."""


def draw(result: Result, out: Path) -> None:
    """Validation loss against steps, those of fit and trial among them: a panel per new task, mean and range over seeds."""
    tasks = dict.fromkeys((record["task"], record["group"]) for record in result["records"])
    with theme():
        figure = new_figure(_PANEL_PX * len(tasks), _HEIGHT_PX)
        panels = np.atleast_1d(figure.subplots(1, len(tasks)))
        panels[0].set_ylabel("validation loss, nats per token")
        for ax, (task, group) in zip(panels, tasks, strict=True):
            _panel(
                ax, [record for record in result["records"] if record["task"] == task], f"{task} ({group})"
            )
        figure.savefig(out, dpi=_DPI, facecolor=LIGHT["card"])


def _panel(ax: Axes, records: Sequence[Mapping[str, Any]], title: str) -> None:
    ax.set_title(title, pad=12)
    for arm, (label, colour) in ARMS.items():
        mine = [record for record in records if record["arm"] == arm]
        if not mine:
            continue
        steps = [mine[0]["fit_steps"] + step for step, _ in mine[0]["looks"]]
        losses = np.array([[loss for _, loss in record["looks"]] for record in mine])
        ax.plot(steps, losses.mean(0), color=LIGHT[colour], linewidth=1.6, label=label)
        ax.fill_between(steps, losses.min(0), losses.max(0), color=LIGHT[colour], alpha=0.2, linewidth=0)
    ends = [record["looks"][-1][1] for record in records if record["arm"] == "base"]
    if ends:
        ax.axhline(float(np.mean(ends)), color=LIGHT["muted"], linewidth=1.2, linestyle=(0, (4, 3)))
    ax.set_yscale("log")
    plain_numbers(ax.yaxis, (1, 2, 5))
    ax.set_xlabel("steps, fit and trial included")
    ax.grid(axis="y")
    ax.set_axisbelow(True)
    ax.legend(frameon=False)


if __name__ == "__main__":
    results, page = Path(sys.argv[1]), Path(sys.argv[2])
    write_text(page, render(page.read_text(encoding="utf-8"), results, SECTIONS))
    draw(read_json(results / RESULT), Path(sys.argv[3]))
