"""The study one-model: how much of several tasks one set of weights keeps, however it is made.

    trace-dist study one-model --config configs/study-one-model.yaml

Every method of the configuration learns the tasks through the driver of ``trace-dist run``, in several orders and with several
seeds; each order and seed is a run in a folder of its own. A study that was cut goes on behind the last task that a method has
learned. Learning rates race as the configuration says, anew in each run.

[Note: runs] Order 0 is that of the configuration, the others are shuffled by their number. The seed draws masks, adapters, the
examples and their order, as in any run: runs of one seed have the same examples, and another seed picks or generates others. Base
and proxy are the same in all runs, and are those of the study's own seed.

[Note: pairs] In a run two methods answer the same test examples. A draw takes the examples of each task with replacement, and
moves the mean over the runs, for both methods and all tasks together (studies/statistics.py). Orders of one seed share masks
and examples, and a method that keeps tasks apart has the same result in each: where there are several seeds, they count as
one run, by their mean. With one run an interval knows nothing of how runs differ.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from trace_dist.config import RunConfig
from trace_dist.continual.driver import run_continual
from trace_dist.continual.result import read_result
from trace_dist.stages.base import run_base
from trace_dist.stages.probe import needs_probe, run_probe
from trace_dist.studies.local_tasks import with_local_tasks
from trace_dist.studies.one_model_plan import OneModelConfig, check_study, orders
from trace_dist.studies.settings import shown
from trace_dist.studies.statistics import Answers, Estimate, difference
from trace_dist.studies.stopping import Stopped, stopping
from trace_dist.utils.env import meta_info, run_info
from trace_dist.utils.files import write_json
from trace_dist.utils.locks import hold_until_exit
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)
Runs = dict[tuple[int, int], dict[str, dict[str, Any]]]
"""(order, seed) -> method -> result."""


def runs_of(cfg: RunConfig, study: OneModelConfig) -> Iterator[tuple[tuple[int, int], RunConfig]]:
    """(order, seed) and the run of each; all orders of a seed before the next one."""
    by_name = {task.name: task for task in cfg.tasks}
    for seed in range(study.seeds):
        for number, names in enumerate(orders(list(by_name), study.orders)):
            root = Path(cfg.run_dir) / f"order-{number}-seed-{seed}"
            tasks = [by_name[name] for name in names]
            yield (number, seed), replace(cfg, run_dir=str(root), tasks=tasks, seed=cfg.seed + seed)


def run_study(cfg: RunConfig, study: OneModelConfig, hours: float | None = None) -> dict[str, Any]:
    """Work on the study until it is complete or the time is over; write what it says after each method.

    Args:
        cfg: models, tasks, methods and how they train.
        study: how often.
        hours: after which no method of a run begins; 0 sums up what is known, None sets no limit.

    Returns:
        The summary, as it was written.

    Raises:
        ValueError: as ``check_study``.
    """
    begin = time.monotonic()
    cfg = with_local_tasks(cfg, study.local_tasks)
    check_study(cfg, study)
    hold_until_exit(cfg.folder.lock, f"run_dir={cfg.run_dir!r}")
    found = write_summary(cfg, study)
    try:
        with stopping():
            for run, method in _missing(cfg, study):
                if hours is not None and time.monotonic() - begin >= 3600 * hours:
                    logger.info("study: the time is over; start the same command again to go on")
                    break
                _learn(cfg, run, method)
                found = write_summary(cfg, study)
    except Stopped:
        logger.info("study: stopped; start the same command again to go on")
    return found


def _missing(cfg: RunConfig, study: OneModelConfig) -> Iterator[tuple[RunConfig, str]]:
    """Runs and methods without a result, in order."""
    for _, run in runs_of(cfg, study):
        for method in cfg.continual.methods:
            if not run.folder.method(method).is_file():
                yield run, method


def _learn(cfg: RunConfig, run: RunConfig, method: str) -> None:
    """Let one method of a run learn all tasks."""
    if needs_probe(run) and not run.folder.specificity.is_file():
        # With the study's own seed: all runs share base and proxy.
        run_base(cfg, None)
        run_probe(run)
    else:
        run_base(cfg, "target")
    logger.info("study: %s: %s", run.run_dir, method)
    methods = run.continual.methods
    # Some are made of what those before them have left.
    upto = methods[: methods.index(method) + 1]
    run_continual(replace(run, continual=replace(run.continual, methods=upto)))


def read_runs(cfg: RunConfig, study: OneModelConfig) -> Runs:
    """The results that are there."""
    return {
        key: {
            name: read_result(run.folder.method(name))
            for name in cfg.continual.methods
            if run.folder.method(name).is_file()
        }
        for key, run in runs_of(cfg, study)
    }


def write_summary(cfg: RunConfig, study: OneModelConfig) -> dict[str, Any]:
    """Write what the results say by now."""
    runs = read_runs(cfg, study)
    missing = sum(len(cfg.continual.methods) - len(found) for found in runs.values())
    result = {
        "run_info": run_info(),
        "meta_info": meta_info(),
        "settings": {**shown(cfg, "race", "bank"), "study": asdict(study)},
        "complete": missing == 0,
        "missing": missing,
        **summarise(runs, [task.name for task in cfg.tasks], study),
    }
    write_json(Path(study.out) if study.out else cfg.folder.root / "study.json", result)
    return result


def summarise(runs: Runs, tasks: Sequence[str], study: OneModelConfig) -> dict[str, Any]:
    """By method: its numbers in each run, its share of the bound, and how far ours lies above it.

    Args:
        runs: results; ``tasks`` names their columns in order 0.
        study: which methods are ours and the bound.
    """
    names = list(dict.fromkeys(name for found in runs.values() for name in found))
    methods = {}
    for name in names:
        own = {key: found[name] for key, found in runs.items() if name in found}
        methods[name] = {
            "label": next(iter(own.values()))["label"],
            "runs": [{"order": key[0], "seed": key[1], **_numbers(result)} for key, result in own.items()],
            "average": _mean([result["average_accuracy"] for result in own.values()]),
            "share_of_bound": _share(runs, tasks, name, study.bound),
            "ours_above": None if name == study.ours else _above(runs, tasks, study.ours, name),
        }
    return {"methods": methods}


def _numbers(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the study keeps of one result: percent, points, and the rise of general text's bits per byte in percent."""
    kept = {key: result[key] for key in ("average_accuracy", "forgetting", "lr", "seconds") if key in result}
    rises = [100 * (found[-1] / found[0] - 1) for found in result["bits_per_byte"].values()]
    return {
        **kept,
        "general_delta": result.get("general_delta"),
        "text_rise_percent": float(np.mean(rises)) if rises else None,
        "commit": result["measured"]["commit"],
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _pairs(runs: Runs, tasks: Sequence[str], first: str, second: str) -> list[tuple[Answers, Answers]] | None:
    """Per task the scores, in percent, of two methods in the runs that both have; None where there is none."""
    both = {key: found for key, found in runs.items() if first in found and second in found}
    if not both:
        return None
    several = len({seed for _, seed in both}) > 1
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for (order, seed), found in both.items():
        # Orders of one seed count as one run.
        groups.setdefault(seed if several else order, []).append(found)
    own = [*groups.values()]
    return [(_scores(own, first, task), _scores(own, second, task)) for task in tasks]


def _scores(groups: Sequence[Sequence[Mapping[str, Any]]], method: str, task: str) -> Answers:
    """A method's scores in percent, the mean of each group of runs."""
    means = [np.mean([found[method]["per_example"][task] for found in group], axis=0) for group in groups]
    each = np.array(means, dtype=np.float64)
    return Answers(100 * each, np.ones(each.shape[1]))


def _above(runs: Runs, tasks: Sequence[str], ours: str, other: str) -> dict[str, Any] | None:
    """How many points ours lies above another method, on average over tasks."""
    pairs = _pairs(runs, tasks, ours, other)
    return None if pairs is None else _judged(difference(pairs, paired=True))


def _share(runs: Runs, tasks: Sequence[str], method: str, bound: str) -> float | None:
    """A method's average as percent of the bound's, in the runs that both have."""
    pairs = _pairs(runs, tasks, method, bound)
    if pairs is None:
        return None
    own, best = (_mean([pair[side].loss for pair in pairs]) for side in (0, 1))
    return 100 * own / best if best else None


def _judged(found: Estimate) -> dict[str, Any]:
    return {
        **found.to_json(),
        "verdict": {"lower": "below", "higher": "above"}.get(found.verdict, "undecided"),
    }
