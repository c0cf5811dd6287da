"""docs/retrieval.md and its picture, from the results of the study; a test compares the tables.

python -m trace_dist.benchmarks.retrieval_page docs/results docs/retrieval.md docs/retrieval.png
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from trace_dist.benchmarks.document import Result, Sections, grid, render, with_origin
from trace_dist.report.plots import label_ends
from trace_dist.report.theme import LIGHT, new_figure, theme
from trace_dist.utils.files import read_json, write_text

RESULT, ROUTES = "retrieval.json", "routes.json"
SHOWN_LIMITS = {
    "clopper_pearson": "Clopper-Pearson",
    "gaussian": "Gaussian, held-out",
    "cantelli": "Cantelli, held-out",
    "separation": "Gaussian (estimate)",
    "separation_any": "Cantelli (estimate)",
}
ESTIMATES = ("separation", "separation_any")
"""No limits: they take fitted parameters for the true ones."""
COLOURS = ("blue", "vermillion", "green", "amber", "pink")
End = tuple[str, float, str]
"""Label of a curve, its last value, and its colour."""
SIZE_PX = (1200, 400)
_DPI = 108
LEAST_PERCENT = 1e-2
"""Where a logarithmic axis begins; what is 0 is drawn there."""


def kinds_table(result: Result) -> str:
    """Accuracy with its 95 % interval by kind and number of tasks."""
    sizes = [size["tasks"] for size in result["kinds"][0]["sizes"]]
    rows = []
    for kind in result["kinds"]:
        cells = [f"{size['accuracy']:.1f} ({size['low']:.1f}–{size['high']:.1f})" for size in kind["sizes"]]  # noqa: RUF001
        rows.append([kind["kind"], *cells])
    return with_origin(result, grid(["retrieved, %", *(f"{size} tasks" for size in sizes)], rows))


def costs_table(result: Result) -> str:
    """What a kind costs: time of a prompt behind its forward pass, time of a fit, size."""
    rows = []
    for kind in result["kinds"]:
        times = [f"{size['retrieve_ms']:.2f}" for size in kind["sizes"]]
        sizes = [f"{kind['clusters']:.1f}", f"{kind['fit_s']:.2f}", f"{kind['bytes'] / 2**20:.2f}"]
        rows.append([kind["kind"], *times, *sizes])
    heads = [f"ms, {size['tasks']} tasks" for size in result["kinds"][0]["sizes"]]
    return with_origin(result, grid(["", *heads, "clusters", "fit, s", "MiB per task"], rows))


def bounds_table(result: Result) -> str:
    """Limits of the default kind beside the error of fresh prompts; what is broken is marked."""
    rows = []
    for size in result["kinds"][0]["sizes"]:
        cells = [f"{size['error']:.2f}", f"{100 - size['shifted']['accuracy']:.2f}"]
        for name in SHOWN_LIMITS:
            cells.append(_cell(size, name))
        rows.append([str(size["tasks"]), *cells, *_normality(size["normality"])])
    heads = ["tasks", "error, %", "in other words", *SHOWN_LIMITS.values(), "Mardia's p", "kurtosis"]
    return with_origin(result, grid(heads, rows))


def _cell(size: Result, name: str) -> str:
    """A limit, and whether the error of fresh prompts lies above it."""
    above = "too low" if name in ESTIMATES else "broken"
    return f"{size['limits'][name]:.2f}" + ("" if size["held"][name] else f" ({above})")


def _normality(found: Result | None) -> list[str]:
    """p value, and kurtosis in units of a Gaussian's."""
    if found is None:
        return ["–", "–"]  # noqa: RUF001
    return [f"{found['p_value']:.0e}" if found["p_value"] > 1e-16 else "< 1e-16", f"{found['kurtosis']:.1f}"]


def shift_table(result: Result) -> str:
    """Accuracy on the same prompts in other words."""
    rows = []
    for kind in result["kinds"]:
        cells = [
            f"{size['shifted']['accuracy']:.1f} ({size['shifted']['low']:.1f}–{size['shifted']['high']:.1f})"  # noqa: RUF001
            for size in kind["sizes"]
        ]
        rows.append([kind["kind"], *cells])
    heads = ["in other words, %", *(f"{size['tasks']} tasks" for size in result["kinds"][0]["sizes"])]
    return with_origin(result, grid(heads, rows))


def held_table(result: Result) -> str:
    """Limits of all kinds among all tasks."""
    rows = []
    for kind in result["kinds"]:
        size = kind["sizes"][-1]
        cells = [
            "–" if size["limits"][name] == 100 else _cell(size, name)  # noqa: RUF001
            for name in SHOWN_LIMITS
        ]
        rows.append([kind["kind"], f"{size['error']:.2f}", *cells])
    return with_origin(result, grid(["", "error, %", *SHOWN_LIMITS.values()], rows))


def twins_table(result: Result) -> str:
    """The pairs that the default kind confuses most."""
    rows = [
        [pair["task"], pair["retrieved"], f"{pair['percent']:.0f}"]
        for pair in result["kinds"][0]["confused"][:12]
    ]
    return with_origin(result, grid(["prompts of", "go to", "%"], rows))


def views_table(result: Result) -> str:
    """Accuracy by hidden layer and pooling, one cluster per task, all tasks."""
    rows = []
    for row in result["views"]:
        found = [row, row["shifted"]] if "accuracy" in row else []
        said = [f"{each['accuracy']:.1f} ({each['low']:.1f}–{each['high']:.1f})" for each in found]  # noqa: RUF001
        rows.append([str(row["layer"]), f"`{row['pooling']}`", *(said or ["all alike", ""])])
    return with_origin(result, grid(["layer", "pooling", "retrieved, %", "in other words, %"], rows))


def rejection_table(result: Result) -> str:
    """Rejected prompts of known tasks, of the same in other words, and of tasks that the bank does not hold."""
    rows = []
    for kind in result["kinds"]:
        found = kind["rejection"]
        rows.append([kind["kind"], *(f"{found[key]:.1f}" for key in ("known", "shifted", "unknown"))])
    return with_origin(result, grid(["rejected, %", "known", "in other words", "unknown"], rows))


def routes_table(result: Result) -> str:
    """Time until a prompt has its task, by the number of tasks, beside that with one task."""
    rows = [
        [str(row["tasks"])]
        + [f"{row[f'{kind}_ms']:.0f} ({row[f'{kind}_ratio']:.2f}x)" for kind in ("base", "adapted")]
        for row in result["rows"]
    ]
    return with_origin(result, grid(["tasks in the bank", "`base`, ms", "`adapted`, ms"], rows))


SECTIONS: Sections = {
    "kinds": ((RESULT,), kinds_table),
    "costs": ((RESULT,), costs_table),
    "bounds": ((RESULT,), bounds_table),
    "shift": ((RESULT,), shift_table),
    "held": ((RESULT,), held_table),
    "twins": ((RESULT,), twins_table),
    "views": ((RESULT,), views_table),
    "rejection": ((RESULT,), rejection_table),
    "routes": ((ROUTES,), routes_table),
}
"""Section of docs/retrieval.md -> its result files and its table."""


def draw(result: Result, out: Path) -> None:
    """Accuracy, error with its limits, and time against the number of tasks."""
    with theme():
        figure = new_figure(*SIZE_PX)
        accuracy, bounds, cost = figure.subplots(1, 3)
        _draw_accuracy(accuracy, result)
        _draw_bounds(bounds, result)
        _draw_cost(cost, result)
        figure.savefig(out, dpi=_DPI, facecolor=LIGHT["card"])


def _several(sizes: Sequence[Result]) -> Sequence[Result]:
    """Banks of more than one task, among which something can be confused."""
    return [size for size in sizes if size["tasks"] > 1] or sizes


def _begin(ax: Axes, sizes: Sequence[Result], title: str) -> None:
    """Axes against the number of tasks, each number as far from the next."""
    ax.set_title(title, pad=12)
    ax.set_xticks(range(len(sizes)), [str(size["tasks"]) for size in sizes])
    ax.set_xlim(-0.35, len(sizes) - 0.65)
    ax.set_xlabel("tasks in the bank")
    ax.grid(axis="y")
    ax.set_axisbelow(True)
    ax.tick_params(length=0)


def _draw_accuracy(ax: Axes, result: Result) -> None:
    """Of each kind, with its 95 % interval; side by side, since the intervals overlap."""
    ends = list[End]()
    _begin(ax, _several(result["kinds"][0]["sizes"]), "prompts that find their task, %")
    for number, (kind, colour) in enumerate(zip(result["kinds"], COLOURS, strict=False)):
        sizes = _several(kind["sizes"])
        low, right, high = ([size[key] for size in sizes] for key in ("low", "accuracy", "high"))
        x = [place + 0.07 * (number - (len(result["kinds"]) - 1) / 2) for place in range(len(sizes))]
        ax.vlines(x, low, high, color=LIGHT[colour], linewidth=1.4)
        ax.plot(x, right, color=LIGHT[colour], linewidth=1.2, marker="o", markersize=4)
        ends.append((kind["kind"], right[-1], LIGHT[colour]))
    label_ends(ax, ends)


def _draw_cost(ax: Axes, result: Result) -> None:
    _begin(ax, result["kinds"][0]["sizes"], "processor time of a prompt, ms")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ends = list[End]()
    for kind, colour in zip(result["kinds"], COLOURS, strict=False):
        ends.append(_line(ax, [size["retrieve_ms"] for size in kind["sizes"]], kind["kind"], colour))
    forward = result["represent_ms"]
    ax.axhline(forward, color=LIGHT["muted"], linewidth=1.2, linestyle=(0, (4, 3)))
    beside: dict[str, Any] = {
        "xytext": (0, 4),
        "textcoords": "offset points",
        "color": LIGHT["muted"],
        "size": 10.5,
    }
    ax.annotate("forward pass of the prompt", (-0.3, forward), **beside)
    ax.set_ylim(top=max(ax.get_ylim()[1], 1.8 * forward))
    label_ends(ax, ends)


def _draw_bounds(ax: Axes, result: Result) -> None:
    sizes = _several(result["kinds"][0]["sizes"])
    _begin(ax, sizes, f"error of {result['kinds'][0]['kind']} and its limits, %")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"≤ {value:g}" if value <= LEAST_PERCENT else f"{value:g}")
    )
    ax.yaxis.set_minor_formatter(NullFormatter())
    curves = [
        (label, [size["limits"][name] for size in sizes], colour, "-")
        for (name, label), colour in zip(SHOWN_LIMITS.items(), COLOURS, strict=True)
    ]
    curves.append(("error", [size["error"] for size in sizes], "ink", "-"))
    curves.append(("in other words", [100 - size["shifted"]["accuracy"] for size in sizes], "ink", ":"))
    ends = [
        _line(ax, [max(LEAST_PERCENT, value) for value in values], label, colour, style)
        for label, values, colour, style in curves
    ]
    label_ends(ax, ends, longest=20)


def _line(ax: Axes, y: list[float], label: str, colour: str, style: str = "-") -> End:
    """A curve; what ``label_ends`` is told of it."""
    ax.plot(range(len(y)), y, style, color=LIGHT[colour], linewidth=1.6, marker="o", markersize=4)
    return label, y[-1], LIGHT[colour]


if __name__ == "__main__":
    results, page = Path(sys.argv[1]), Path(sys.argv[2])
    write_text(page, render(page.read_text(encoding="utf-8"), results, SECTIONS))
    draw(read_json(results / RESULT), Path(sys.argv[3]))
