"""Draw what the faults have brought into docs/reliability.md.

PYTHONPATH=tests:tests/cli python -m faults.page
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from faults.cases import CASES
from faults.grammar import KINDS

from trace_dist.utils.files import read_json, write_text

ROOT = Path(__file__).parents[2]
CAME = {
    "goes on": "the job goes on, with the same bits",
    "recovers": "ends; the same command goes on to the same bits",
    "refused": "ends with one line; the same command goes on after the cure",
    "skips": "the step is skipped and named",
    "goes back": "the training goes back to a checkpoint",
}


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def kinds() -> str:
    """What may be injected."""
    rows = [
        [f"`{name}`", kind.what, ", ".join(f"`{key}`" for key in kind.keys)] for name, kind in KINDS.items()
    ]
    return table(["kind", "what happens", "keys"], rows)


def faults() -> str:
    """What came of each case."""
    found = read_json(ROOT / "docs" / "results" / "faults.json")
    rows = []
    for case in CASES:
        came = found["cases"].get(case.name)
        if came is None:
            continue
        if "skipped" in came:
            rows.append([case.name, f"not tried: {came['skipped']}", "", "", ""])
            continue
        lost, going = came.get("steps_lost"), came.get("seconds_of_the_restart")
        numbers = [
            f"{came['seconds']:.0f}",
            *("-" if each is None else f"{each:.0f}" for each in (going, lost)),
        ]
        rows.append([f"{case.name}", CAME[case.outcome], *numbers])
    tried = [came for came in found["cases"].values() if "skipped" not in came]
    restarts = [
        came["seconds_of_the_restart"] for came in tried if came.get("seconds_of_the_restart") is not None
    ]
    return (
        table(["fault", "what came of it", "s to its end", "s to go on", "steps lost"], rows)
        + f"\n\n{len(tried)} faults; the longest took {max(came['seconds'] for came in tried):.0f} s from the fault to the end "
        f"of all processes, and {max(restarts):.0f} s from the restart to its first step. {_where(found, list(tried))}"
    )


def soak() -> str:
    """What the soak has brought so far."""
    found = read_json(ROOT / "docs" / "results" / "soak.json")
    rows = [
        [kind, *(str(came[name]) for name in ("recovered", "refused", "went on")), f"{came['median_seconds']:.0f}",
         f"{came['most_seconds']:.0f}", str(came["most_steps_lost"])]
        for kind, came in found["kinds"].items()
    ]  # fmt: skip
    head = ["kind", "recovered", "refused", "went on", "s to the end, median", "most", "steps lost, most"]
    trainings = found["trainings"]
    settings = ", ".join(sorted({each["setting"] for each in trainings}))
    return (
        table(head, rows)
        + f"\n\n{found['faults']} faults in {len(trainings)} trainings ({settings}); {found['same_bits']} of them ended with the "
        f"bits of an undisturbed one, and there were {found['problems']} problems. {_where(found, trainings)}"
    )


def _where(found: dict[str, Any], measured: list[dict[str, Any]]) -> str:
    meta, last = found["meta_info"], max(measured, key=lambda each: each["date"])
    return f"{last['date'][:10]}, commit {last['commit']}, {meta['hardware']}, beside other work."


def main() -> None:
    path = ROOT / "docs" / "reliability.md"
    text = path.read_text(encoding="utf-8")
    for name, draw in (("kinds", kinds), ("faults", faults), ("soak", soak)):
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if name != "kinds" and not (ROOT / "docs" / "results" / f"{name}.json").is_file():
            continue
        text = re.sub(
            f"{start}.*?{end}",
            lambda _, draw=draw, s=start, e=end: f"{s}\n\n{draw()}\n\n{e}",
            text,
            flags=re.DOTALL,
        )  # type: ignore[misc]
    write_text(path, text)


if __name__ == "__main__":
    main()
