"""The cells of a study's result, as tables and picture read them."""

from __future__ import annotations

from trace_dist.benchmarks.document import Result


def by_kind(result: Result) -> list[tuple[str, float | None, list[Result]]]:
    """Cells of an arm and a density, over tasks."""
    kinds: dict[tuple[str, float | None], list[Result]] = {}
    for cell in result["cells"]:
        if cell["seeds"]:
            kinds.setdefault((cell["arm"], cell["density"]), []).append(cell)
    order = sorted(kinds, key=lambda kind: (kind[1] or 1.0, place(result, kind[0])))
    return [(arm, density, kinds[arm, density]) for arm, density in order]


def place(result: Result, arm: str) -> int:
    return list(result["arms"]).index(arm)
