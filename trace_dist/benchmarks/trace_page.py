"""What `make trace-small` showed: a record of its results, and their table in docs/data.md.

python -m trace_dist.benchmarks.trace_page runs/trace-small/results.json docs/results docs/data.md
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trace_dist.benchmarks.document import Sections, grid, render, with_origin
from trace_dist.utils.files import read_json, write_json, write_text

RECORD = "trace_small.json"
METHOD = "retrieved"


def record(results: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a run: of each task its metric, and its scores before, right after and at the end of the stream."""
    run, scores = results["run_info"], results["modes"][METHOD]["R"]
    metrics = {task["name"]: task["metric"] for task in results["config"]["tasks"]}
    rows = [
        {
            "name": name,
            "metric": metrics[name],
            "base": scores[0][place],
            "learned": scores[place + 1][place],
            "end": scores[-1][place],
            "majority": results["baselines"]["majority"][place],
            "num_test": results["baselines"]["num_test"][place],
        }
        for place, name in enumerate(results["tasks"])
    ]
    run_info = {"date": run["date"], "commit": ", ".join(run["commits"])}
    return {"run_info": run_info, "meta_info": results["meta_info"], "rows": rows}


def table(result: Mapping[str, Any]) -> str:
    """Scores in percent."""
    rows = [
        [
            row["name"],
            row["metric"],
            *(f"{row[key]:.1f}" for key in ("base", "learned", "end", "majority")),
        ]
        for row in result["rows"]
    ]
    return with_origin(
        result, grid(["task", "metric", "before", "learned", "at the end", "commonest answer"], rows)
    )


SECTIONS: Sections = {"trace-small": ((RECORD,), table)}


def main(results: str, folder: str, page: str) -> None:
    """The command line."""
    write_json(Path(folder) / RECORD, record(read_json(Path(results))))
    document = Path(page)
    write_text(document, render(document.read_text(encoding="utf-8"), Path(folder), SECTIONS))


if __name__ == "__main__":
    main(*sys.argv[1:])
