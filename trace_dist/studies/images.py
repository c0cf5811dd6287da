"""Class-incremental images: every method on both protocols of PILOT, over seeds.

    python -m trace_dist.studies.images --config configs/digits.yaml --out docs/results/digits.json --page docs/images.md

[Note: protocols] B0-Inc<n> (PILOT, arXiv 2309.07117): no class is known at first, and each task brings n new ones, in the order
``numpy.random.permutation`` gives with seed 1993; at test time no task is named. The configuration lists the tasks of one
protocol; the others regroup its classes, with as many steps per class. A seed draws the base, the masks and the order of the
examples; the order of the classes stays.

A run is resumed where it was cut. One that the result holds is not done again; delete the file to begin anew. Differences are
paired by seed; their intervals are those of Student's t.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy import stats

from trace_dist.config import RunConfig
from trace_dist.config.checks import check
from trace_dist.continual.driver import run_continual
from trace_dist.continual.result import read_result
from trace_dist.report.markdown import insert
from trace_dist.stages.base import prepare_base
from trace_dist.stages.probe import run_probe
from trace_dist.utils.env import meta_info, run_info
from trace_dist.utils.files import read_json, write_json, write_text
from trace_dist.utils.registry import instance

CLASS_SEED = 1993
LEVEL = 0.95
OURS = "retrieved"
NUMBERS = ("pilot_average_accuracy", "average_accuracy", "forgetting")
"""Of each method and run: PILOT's "average accuracy", the final one of this project, forgetting; in percent and points."""


RETRIEVAL = (
    "accuracy", "tasks", "columns", "confusion", "error_bound", "error_bound_per_task", "gaussian_error_bound",
    "gaussian_error_bound_per_task", "cantelli_error_bound",
)  # fmt: skip
"""What is kept of an account of a retrieval."""


def read_run(path: Path) -> RunConfig:
    """A run's configuration.

    Raises:
        ValueError: a value makes no sense.
    """
    return instance(RunConfig, yaml.safe_load(path.read_text(encoding="utf-8")), str(path))  # type: ignore[no-any-return]


def class_order(num_classes: int) -> list[int]:
    """The order in which PILOT's tasks bring classes."""
    return [int(index) for index in np.random.RandomState(CLASS_SEED).permutation(num_classes)]


def protocol(cfg: RunConfig, increment: int, seed: int) -> RunConfig:
    """The run of B0-Inc<increment> with a seed, beside those of the other protocols; its base is shared by them.

    Raises:
        ValueError: the tasks do not name their classes, or these do not divide into such increments.
    """
    first, classes = cfg.tasks[0], [name for task in cfg.tasks for name in task.answers or []]
    if len(classes) % increment or not first.answers:
        raise ValueError(
            f"increment={increment}: does not divide the {len(classes)} classes that tasks.answers name; choose another one"
        )
    steps = round((first.steps or cfg.train.steps) * increment / len(first.answers))
    groups = [classes[begin : begin + increment] for begin in range(0, len(classes), increment)]
    tasks = [
        replace(first, name=f"classes_{'_'.join(group)}", answers=group, steps=steps) for group in groups
    ]
    root = Path(cfg.run_dir) / f"seed{seed}"
    target = replace(cfg.target, path=str(root / "models" / "target"))
    return replace(cfg, run_dir=str(root / f"inc{increment}"), target=target, tasks=tasks, seed=seed)


def run_one(cfg: RunConfig) -> dict[str, Any]:
    """The results of all methods of a run, by method."""
    if not all(cfg.folder.method(name).is_file() for name in cfg.continual.methods):
        prepare_base(cfg, "target")
        if not cfg.folder.specificity.is_file():
            run_probe(cfg)
        run_continual(cfg)
    return {name: _shown(read_result(cfg.folder.method(name))) for name in cfg.continual.methods}


def _shown(result: dict[str, Any]) -> dict[str, Any]:
    kept = (*NUMBERS, "label", "R", "lr", "seconds", "trainable", "density", "delta_bytes", "kept_bytes")
    found = {key: result[key] for key in kept if key in result}
    if "retrieval" in result:
        found["retrieval"] = {
            key: result["retrieval"][key] for key in RETRIEVAL if key in result["retrieval"]
        }
    return found


def interval(values: Sequence[float]) -> list[float]:
    """Mean, and the ends of its 95 % interval by Student's t; the mean alone where there is but one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return [mean]
    half = float(
        stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    )
    return [mean, mean - half, mean + half]


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By protocol and method: means over seeds, and how far ``retrieved`` lies above the method, paired by seed."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(run["protocol"] for run in runs):
        same = [run["methods"] for run in runs if run["protocol"] == name]
        found[name] = {}
        for method in same[0]:
            each: dict[str, Any] = {key: interval([run[method][key] for run in same]) for key in NUMBERS}
            if "retrieval" in same[0][method]:
                each["retrieval"] = interval([run[method]["retrieval"]["accuracy"] for run in same])
            gains = [run[OURS][NUMBERS[0]] - run[method][NUMBERS[0]] for run in same]
            found[name][method] = each | {"label": same[0][method]["label"], "ours_above": interval(gains)}
    return found


def run_study(cfg: RunConfig, increments: Sequence[int], seeds: Sequence[int], out: Path) -> dict[str, Any]:
    """All runs that the result does not hold yet; it is written after each.

    Raises:
        ValueError: the result holds runs of other methods, which none of the present ones could stand beside.
    """
    runs: list[dict[str, Any]] = read_json(out)["runs"] if out.is_file() else []
    methods = cfg.continual.methods
    for run in runs:
        rule, cure = f"{out} holds runs of {', '.join(run['methods'])}", "name these, or another file"
        check(set(run["methods"]) == set(methods), "continual.methods", methods, rule, cure)
    done = {(run["protocol"], run["seed"]) for run in runs}
    for seed in seeds:
        for increment in increments:
            about = {"protocol": f"B0-Inc{increment}", "seed": seed}
            if (about["protocol"], seed) in done:
                continue
            runs.append(about | {"methods": run_one(protocol(cfg, increment, seed)), "measured": run_info()})
            result = {"run_info": run_info(), "meta_info": meta_info(), "class_seed": CLASS_SEED}
            result |= {"tasks": [task.answers for task in cfg.tasks], "runs": runs, "summary": summary(runs)}
            write_json(out, result)
    return read_json(out)  # type: ignore[no-any-return]


def table(result: dict[str, Any]) -> str:
    """The summary as Markdown."""
    lines = []
    for name, methods in result["summary"].items():
        seeds = sum(run["protocol"] == name for run in result["runs"])
        lines += [
            f"**{name}**, {seeds} seed{'s' * (seeds > 1)}:",
            "",
            "| method | PILOT's average accuracy, % | final average, % | forgetting, points | retrieval, % | ours above it |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        ranked = sorted(methods.items(), key=lambda pair: -pair[1][NUMBERS[0]][0])
        for method, each in ranked:
            cells = [_spread(each[key]) for key in NUMBERS]
            retrieval = _spread(each["retrieval"]) if "retrieval" in each else "-"
            above = "-" if method == OURS else _signed(each["ours_above"])
            lines.append(f"| {each['label']} | {' | '.join([*cells, retrieval, above])} |")
        lines.append("")
    run, meta = result["run_info"], result["meta_info"]
    # Each run has its own, but for those of earlier releases.
    commits = dict.fromkeys(str(each.get("measured", run)["commit"]) for each in result["runs"])
    told = f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
    return "\n".join(lines) + f"\n{str(run['date'])[:10]}, {told}, {meta['hardware']}.\n"


def _spread(values: Sequence[float]) -> str:
    return f"{values[0]:.1f}" if len(values) == 1 else f"{values[0]:.1f} ± {values[2] - values[0]:.1f}"


def _signed(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:+.1f}"
    return f"{values[0]:+.1f} [{values[1]:+.1f}, {values[2]:+.1f}]"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Class-incremental images over seeds; writes JSON and its table."
    )
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--page", type=Path, help="document with the markers of the table, called as the result"
    )
    parser.add_argument("--increments", type=int, nargs="+", default=[2, 5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    result = run_study(read_run(given.config), given.increments, given.seeds, given.out)
    if given.page is not None:
        page = insert(given.page.read_text(encoding="utf-8"), given.out.stem, table(result))
        write_text(given.page, page)
    print(table(result))


if __name__ == "__main__":
    main()
