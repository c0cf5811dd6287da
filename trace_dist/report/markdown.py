"""The comparison of methods as Markdown, and keeping it in a document beside the results that it shows.

    python -m trace_dist.report.markdown docs/results/quickstart.json README.md quickstart

writes the table of the results between ``<!-- quickstart -->`` and ``<!-- /quickstart -->``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trace_dist.report.narrative import chosen_rates
from trace_dist.report.results import RunView, load_results, number, parse_results
from trace_dist.report.tables import COLUMNS, MISSING, duration, method_cells
from trace_dist.utils.files import write_text


def markdown_table(results: Mapping[str, Any]) -> str:
    """One row per method, and a line that says how learning rates were chosen, and where and when it was measured.

    Raises:
        ValueError: `results` lacks "tasks" or "modes".
    """
    view = parse_results(results)
    # A bar would begin another cell.
    cells = [(method.label.replace("|", r"\|"), method_cells(view, method)) for method in view.methods]
    shown = [i for i in range(len(COLUMNS)) if any(row[i] != MISSING for _, row in cells)]
    heads = [f"{COLUMNS[i].head}, {COLUMNS[i].unit}" for i in shown]
    lines = ["| method | " + " | ".join(heads) + " |", "|---" + "|---:" * len(heads) + "|"]
    lines += ["| " + " | ".join([label, *(row[i] for i in shown)]) + " |" for label, row in cells]
    return "\n".join(lines) + "\n\n" + " ".join([*chosen_rates(view), _provenance(view)]) + "\n"


def _provenance(view: RunView) -> str:
    run, meta = view.part("run_info"), view.part("meta_info")
    commits = [
        commit + (f" ({', '.join(labels)})" if labels else "") for commit, labels in view.commits.items()
    ]
    told = f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}" if commits else ""
    facts = [str(run.get("date", ""))[:10], told, str(meta.get("hardware", ""))]
    seconds = number(run.get("seconds"))
    took = "" if math.isnan(seconds) else f"; {duration(seconds)} in all"
    return f"{', '.join(fact for fact in facts if fact)}{took}."


def insert(document: str, section: str, text: str) -> str:
    """`document` with what stands between the markers of `section` replaced.

    Raises:
        ValueError: the markers are missing.
    """
    start, end = f"<!-- {section} -->", f"<!-- /{section} -->"
    if document.count(start) != 1 or document.count(end) != 1:
        raise ValueError(f"document: needs {start} and {end} once each; add the two lines")
    head, rest = document.split(start)
    return f"{head}{start}\n\n{text}\n{end}{rest.split(end)[1]}"


def main(results: str, document: str, section: str) -> None:
    path = Path(document)
    write_text(path, insert(path.read_text(encoding="utf-8"), section, markdown_table(load_results(results))))


if __name__ == "__main__":
    main(*sys.argv[1:])
