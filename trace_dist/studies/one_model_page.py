"""The table of the study one-model in docs/studies.md."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from trace_dist.benchmarks.document import Result, grid, with_origin

RESULT = "study_one_model_toy.json"
MISSING = "–"  # noqa: RUF001


def one_model_table(result: Result) -> str:
    """How much each method keeps, and how far ours lies above it; the best first."""
    study, methods = result["settings"]["study"], result["methods"]
    ranked = sorted(methods.values(), key=lambda method: -method["average"])
    rows = [
        [
            method["label"],
            f"{method['average']:.1f}",
            MISSING if method["share_of_bound"] is None else f"{method['share_of_bound']:.0f}",
            above(method["ours_above"]),
            f"{mean(run['forgetting'] for run in method['runs']):.1f}",
            _mean([run["general_delta"] for run in method["runs"]]),
            _mean([run["text_rise_percent"] for run in method["runs"]]),
            _rates([run["lr"] for run in method["runs"]]),
            str(len(method["runs"])),
        ]
        for method in ranked
    ]
    head = [
        "method",
        "final average, %",
        f"of {methods[study['bound']]['label'] if study['bound'] in methods else study['bound']}, %",
        "ours above it, points",
        "forgetting, points",
        "general, points",
        "general text, %",
        "peak rates",
        "runs",
    ]
    far = "" if result["complete"] else f"**Not complete**: {result['missing']} results are missing.\n\n"
    return far + with_origin(result, grid(head, rows))


def above(found: dict[str, Any] | None) -> str:
    """A difference with its interval."""
    if found is None:
        return MISSING
    return f"{found['value']:+.1f} ({found['low']:+.1f} to {found['high']:+.1f})"


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{mean(known):+.1f}" if known else MISSING


def _rates(values: Sequence[float | None]) -> str:
    known = sorted({value for value in values if value is not None})
    return " to ".join(f"{value:g}" for value in dict.fromkeys((known[0], known[-1]))) if known else MISSING
