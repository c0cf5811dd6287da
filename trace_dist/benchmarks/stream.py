"""A long stream: every task of a configuration learned by a command of its own, one after another, into one bank.

    python -m trace_dist.benchmarks.stream --config configs/stream20.yaml --out docs/results/stream20.json

Per task: wall and processor time of ``trace-dist learn``, the resident set of its largest process, the size of the bank, and the
score when it was learned. After the last one ``trace-dist eval`` scores all of them through the bank. Then the first task is
learned once more under another name, into a copy of the full bank: the same work as at the beginning, so what it takes more is
what a full bank costs. A stream that was cut goes on behind the last task in its JSON; the time of a task that was cut is not
whole, so it is learned anew.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from trace_dist.bank.bank import DeltaBank
from trace_dist.launching import ProcessFailed, launch_environment
from trace_dist.run_folder import BankFolder
from trace_dist.utils.env import meta_info, run_info
from trace_dist.utils.files import read_json, write_json, write_text

METHOD = "retrieved"
OF_THE_WHOLE = ("tasks", "run_dir")
"""Sections of the configuration that a single task's does not take over."""


def run_stream(config: Path, out: Path) -> dict[str, Any]:
    """Learn all tasks of a configuration one by one, and write the result after each.

    Args:
        config: a run's configuration.
        out: JSON file.

    Raises:
        ProcessFailed: a command failed; its own error is printed above.
    """
    whole = yaml.safe_load(config.read_text(encoding="utf-8"))
    folder = Path(whole["run_dir"])
    bank = folder / "bank"
    found = read_json(out) if out.is_file() and _there(bank) else {"tasks": []}
    result: dict[str, Any] = {"run_info": run_info(), "meta_info": meta_info(), "tasks": found["tasks"]}
    command("base", "--config", str(config))
    for task in whole["tasks"][len(result["tasks"]) :]:
        result["tasks"].append(_learn(whole, task, folder, bank))
        write_json(out, result)
    command("eval", "--config", str(config), "--bank_folder", str(bank))
    scores = read_json(folder / "eval.json")
    for task in result["tasks"]:
        answered = scores["answered_by"][task["name"]]
        task["final"] = scores["scores"][task["name"]]
        task["retrieved_percent"] = 100 * answered.get(task["name"], 0) / sum(answered.values())
    result["again"] = _again(whole, folder, bank)
    write_json(out, result)
    return result


def _there(bank: Path) -> bool:
    """Whether there is a bank; a command that was cut may have left a folder."""
    return BankFolder(bank).index.is_file()


def _again(whole: dict[str, Any], folder: Path, bank: Path) -> dict[str, Any]:
    """The first task under another name, into a copy of the bank."""
    first, copy = whole["tasks"][0], folder / "bank_again"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(bank, copy)
    return _learn(whole, {**first, "name": f"{first['name']}_again"}, folder, copy)


def _learn(whole: dict[str, Any], task: dict[str, Any], folder: Path, bank: Path) -> dict[str, Any]:
    """One task by a command of its own."""
    name = task["name"]
    if _there(bank) and name in DeltaBank(bank).tasks:  # cut before its time was written
        command("bank", "remove", str(bank), name)
    shutil.rmtree(f"{bank}.work/{name}", ignore_errors=True)
    config = folder / "configs" / f"{name}.yaml"
    shared = {key: value for key, value in whole.items() if key not in OF_THE_WHOLE}
    write_text(config, yaml.safe_dump(shared | {"tasks": [task]}))
    measured = command("learn", "--config", str(config), "--bank", str(bank))
    learned = read_json(Path(f"{bank}.work/{name}/methods/{METHOD}.json"))
    size = sum(path.stat().st_size for path in bank.rglob("*") if path.is_file())
    return {"name": name, **measured, "bank_bytes": size, "learned": learned["just_trained"][0]}


def command(*arguments: str) -> dict[str, float]:
    """Run a command of ours; what it took."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "trace_dist", *arguments], env=launch_environment())
    _, status, usage = os.wait4(process.pid, 0)  # its own and those of the processes it waited for
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise ProcessFailed(f"{' '.join(arguments)}: exit code {process.returncode}; its error is above")
    return {
        "wall_s": time.perf_counter() - begin,
        "processor_s": usage.ru_utime + usage.ru_stime,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Learn the tasks of a configuration one by one; writes JSON."
    )
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    for task in run_stream(arguments.config, arguments.out)["tasks"]:
        print(
            f"{task['name']}: learned {task['learned']:.1f}, final {task['final']:.1f}, "
            f"retrieved {task['retrieved_percent']:.1f} %, {task['wall_s']:.0f} s, {task['peak_rss_bytes'] / 2**20:.0f} MiB"
        )


if __name__ == "__main__":
    main()
