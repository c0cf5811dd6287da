"""A task that is learned into the bank of a finished run, by a configuration of its own: what becomes of the earlier tasks.

    python -m trace_dist.benchmarks.later --config configs/quickstart.yaml --task configs/later.yaml --out later.json

All are scored through the bank before and after, by ``trace-dist eval``; the bank's files are compared by their checksums. A copy
of the bank is used, so that the run's own stays as it is.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import yaml

from trace_dist.benchmarks.stream import command
from trace_dist.run_folder import BankFolder, RunFolder
from trace_dist.utils.env import meta_info, run_info
from trace_dist.utils.files import read_json, sha256, write_json, write_text


def learn_later(config: Path, task: Path, out: Path) -> dict[str, Any]:
    """Learn a task into a copy of a run's bank, and write what changed.

    Args:
        config: of the finished run.
        task: configuration of the new task.
        out: JSON file.

    Raises:
        ProcessFailed: a command failed; its own error is printed above.
    """
    run, later = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in (config, task))
    folder = Path(run["run_dir"])
    work = folder / "later"
    shutil.rmtree(work, ignore_errors=True)
    bank = shutil.copytree(RunFolder(folder).bank().root, work / "bank")
    before, known = _digests(bank), _scores(run, work / "before", bank)
    measured = command("learn", "--config", str(task), "--bank", str(bank))
    after = _scores(run | {"tasks": run["tasks"] + later["tasks"]}, work / "after", bank)
    kept = _digests(bank)
    result = {
        "run_info": run_info(),
        "meta_info": meta_info(),
        "new": [each["name"] for each in later["tasks"]],
        **measured,
        "files_of_earlier_tasks": len(before),
        "files_that_changed": sorted(name for name, digest in before.items() if kept.get(name) != digest),
        "scores_before": known["scores"],
        "scores_after": after["scores"],
        "answered_by": after["answered_by"],
    }
    write_json(out, result)
    return result


def _digests(bank: Path) -> dict[str, str]:
    """Checksum of every file of the bank's tasks."""
    tasks = BankFolder(bank).tasks
    return {path.relative_to(tasks).as_posix(): sha256(path) for path in tasks.rglob("*") if path.is_file()}


def _scores(config: dict[str, Any], folder: Path, bank: Path) -> dict[str, Any]:
    """What ``eval`` finds of a configuration's tasks through a bank, in one process."""
    alone = {"backend": "single", "launch": {"num_ranks": 1}, "run_dir": str(folder)}
    write_text(folder / "tasks.yaml", yaml.safe_dump(config | alone))
    command("eval", "--config", str(folder / "tasks.yaml"), "--bank_folder", str(bank))
    found: dict[str, Any] = read_json(RunFolder(folder).scores)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Learn a task into a finished run's bank; writes what changed as JSON."
    )
    for name in ("config", "task", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    result = learn_later(arguments.config, arguments.task, arguments.out)
    print(f"files that changed: {len(result['files_that_changed'])} of {result['files_of_earlier_tasks']}")
    for name, score in result["scores_after"].items():
        print(f"{name}: {score:.1f}, before {result['scores_before'].get(name, float('nan')):.1f}")


if __name__ == "__main__":
    main()
