"""How well is the task of a prompt found? Kinds of signature, numbers of tasks, near twins, bounds, a shift, time.

    python -m trace_dist.benchmarks.retrieval --config configs/retrieval.yaml --out docs/results/retrieval.json

Tasks of reasoning-gym under SmolLM2-135M as it is; nothing is trained. Each task's prompts give a signature; prompts that no
signature has seen are then retrieved among the first 1, 5, 20, ... tasks of one random order. A study that was cut goes
on behind the last task whose representations are on disk.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from scipy import stats
from torch import Tensor

from trace_dist.bank.bound import error_bound
from trace_dist.bank.representation import alike
from trace_dist.bank.retrieval import Retriever
from trace_dist.bank.signature import Signature, fit_signature
from trace_dist.benchmarks.representations import Reader, Represented, RetrievalSettings
from trace_dist.config.bank import View
from trace_dist.parts import SIGNATURES
from trace_dist.utils.env import meta_info, run_info
from trace_dist.utils.files import write_json
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)
CONFIDENCE = 0.95
SIZES = (1, 5, 20, 50)
REJECT = 0.05
"""Rate where the configuration rejects nothing."""
NUM_TIMED = 50
"""Prompts, one by one, of which the median time is given."""
LIMITS = {
    "clopper_pearson": "error_bound",
    "gaussian": "gaussian_error_bound",
    "cantelli": "cantelli_error_bound",
    "separation": "separation_estimate",
    "separation_any": "separation_any_estimate",
}
"""Name of a limit here -> in ``ErrorBound.to_json``."""


def run_study(plan: RetrievalSettings, out: Path, sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    """Represent all tasks, compare the kinds of signature, write the result.

    Args:
        plan: what is read.
        out: JSON file.
        sizes: numbers of tasks; all of them is added.
    """
    begin = time.perf_counter()
    reader, tasks = Reader(plan), []
    for number, task in enumerate(plan.tasks, 1):
        tasks.append(reader.read(task))
        logger.info("%d of %d tasks: %s", number, len(plan.tasks), task.name)
    order = np.random.default_rng(plan.seed).permutation(len(tasks))
    tasks = [tasks[index] for index in order]
    result: dict[str, Any] = {"run_info": run_info(), "meta_info": meta_info(), "settings": _settings(plan)}
    result["tasks"] = [
        {"name": task.name, "median_tokens": float(np.median(task.num_tokens))} for task in tasks
    ]
    result["represent_ms"] = _represent_ms(reader, plan)
    result["views"] = [_view(plan, tasks, view) for view in plan.views]
    result["kinds"] = [_kind(plan, tasks, kind, plan.bank.view, sizes) for kind in SIGNATURES]
    result["run_info"]["seconds"] = time.perf_counter() - begin
    write_json(out, result)
    return result


def _settings(plan: RetrievalSettings) -> dict[str, Any]:
    sections = {"target": asdict(plan.model), "data": asdict(plan.data), "bank": asdict(plan.bank)}
    return sections | {"layers": plan.layers, "shift": plan.shift, "seed": plan.seed}


def _represent_ms(reader: Reader, plan: RetrievalSettings) -> float:
    """Processor time of one prompt's forward pass up to the highest layer; a prompt of 60 words."""
    prompt = [" ".join(["word"] * 60)]
    reader.represent(prompt)
    return _median_ms(lambda: reader.represent(prompt), 10)


def _median_ms(work: Callable[[], object], repeats: int) -> float:
    """Processor time of this process: it does not depend on what else the machine does."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return 1e3 * float(np.median(times))


def _fit(
    plan: RetrievalSettings, tasks: Sequence[Represented], kind: str, view: View
) -> tuple[list[Signature], float]:
    """Signatures, and the processor seconds that one took on average."""
    begin = time.process_time()
    signatures = [
        fit_signature(task.train[view], plan.bank.clusters, plan.seed, task.name, kind=kind) for task in tasks
    ]
    return signatures, (time.process_time() - begin) / len(tasks)


def _view(plan: RetrievalSettings, tasks: Sequence[Represented], view: View) -> dict[str, Any]:
    """Accuracy among all tasks by one hidden layer and pooling, with one cluster per task; in other words, too.

    Neither where a task's prompts are all alike.
    """
    layer, pooling = view
    if alike([task.train[view] for task in tasks]):
        return {"layer": layer, "pooling": pooling}
    signatures = [fit_signature(task.train[view], 1, plan.seed, task.name) for task in tasks]
    retriever = Retriever(signatures)
    fresh, shifted = (
        _rate(_errors(retriever, [getattr(task, split)[view] for task in tasks]))
        for split in ("test", "shifted")
    )
    return {"layer": layer, "pooling": pooling, **fresh, "shifted": shifted}


def _kind(
    plan: RetrievalSettings, tasks: Sequence[Represented], kind: str, view: View, sizes: Sequence[int]
) -> dict[str, Any]:
    """All that is measured of one kind of signature."""
    signatures, fit_s = _fit(plan, tasks, kind, view)
    sizes = [size for size in sizes if size < len(tasks)] + [len(tasks)]
    found: dict[str, Any] = {
        "kind": kind,
        "fit_s": fit_s,
        "bytes": float(np.mean([signature.num_bytes for signature in signatures])),
        "clusters": float(np.mean([signature.num_clusters for signature in signatures])),
        "sizes": [_size(signatures[:size], tasks[:size], view) for size in sizes],
        "confused": _confused(signatures, tasks, view),
        "rejection": _rejection(plan, signatures, tasks, view),
    }
    logger.info("%s: %.2f %% of %d tasks", kind, found["sizes"][-1]["accuracy"], len(tasks))
    return found


def _errors(retriever: Retriever, prompts: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Errors and prompts of each task."""
    found = retriever.predict(torch.cat(list(prompts))).split([len(x) for x in prompts])
    return [(int((tasks != index).sum()), len(tasks)) for index, tasks in enumerate(found)]


def _rate(counts: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Accuracy over all prompts with its exact 95 % interval (Clopper-Pearson), percent."""
    wrong, total = (sum(column) for column in zip(*counts, strict=True))
    interval = stats.binomtest(total - wrong, total).proportion_ci(CONFIDENCE, method="exact")
    return {
        "accuracy": 100 * (1 - wrong / total),
        "low": 100 * interval.low,
        "high": 100 * interval.high,
        "prompts": total,
    }


def _size(signatures: Sequence[Signature], tasks: Sequence[Represented], view: View) -> dict[str, Any]:
    """Accuracy, limits and time among some tasks."""
    retriever = Retriever(signatures)
    fresh = _errors(retriever, [task.test[view] for task in tasks])
    report = error_bound(retriever).to_json()
    limits: dict[str, Any] = {name: report[key] for name, key in LIMITS.items()}
    error = 100 - _rate(fresh)["accuracy"]
    probes = torch.cat([task.test[view][:2] for task in tasks])
    rows = iter(range(10**9))
    return {
        "tasks": len(tasks),
        **_rate(fresh),
        "shifted": _rate(_errors(retriever, [task.shifted[view] for task in tasks])),
        "limits": limits,
        # The fresh prompts are a sample too: a limit is broken where their error is above it beyond chance.
        "held": {name: _holds(fresh, limit) for name, limit in limits.items()},
        "error": error,
        "normality": report["normality"],
        "retrieve_ms": _median_ms(
            lambda: retriever.predict(probes[next(rows) % len(probes)][None]), NUM_TIMED
        ),
    }


def _holds(counts: Sequence[tuple[int, int]], limit: float) -> bool:
    """Whether fresh errors are compatible with a limit, in percent: one-sided binomial test at 1 %."""
    wrong, total = (sum(column) for column in zip(*counts, strict=True))
    return bool(stats.binom.sf(wrong - 1, total, min(1.0, limit / 100)) >= 0.01)


def _confused(
    signatures: Sequence[Signature], tasks: Sequence[Represented], view: View
) -> list[dict[str, Any]]:
    """Pairs of tasks that take more than 5 % of each other's prompts, the worst first."""
    retriever, pairs = Retriever(signatures), []
    for index, task in enumerate(tasks):
        found = torch.bincount(retriever.predict(task.test[view]), minlength=len(tasks))
        for other in (20 * found > len(task.test[view])).nonzero()[:, 0].tolist():
            if other != index:
                share = 100 * found[other].item() / len(task.test[view])
                pairs.append({"task": task.name, "retrieved": tasks[other].name, "percent": share})
    return sorted(pairs, key=lambda pair: -pair["percent"])


def _rejection(
    plan: RetrievalSettings, signatures: Sequence[Signature], tasks: Sequence[Represented], view: View
) -> dict[str, Any]:
    """How many prompts of known tasks are rejected, and of tasks that the bank does not hold: the last quarter is left out."""
    rate, num_known = plan.bank.reject or REJECT, len(tasks) - max(1, len(tasks) // 4)
    retriever = Retriever(signatures[:num_known])

    def rejected(some: Sequence[Represented], split: str) -> float:
        x = torch.cat([getattr(task, split)[view] for task in some])
        return 100 * retriever.rejects(x, retriever.predict(x), rate).double().mean().item()

    return {
        "rate": 100 * rate,
        "known_tasks": num_known,
        "known": rejected(tasks[:num_known], "test"),
        "shifted": rejected(tasks[:num_known], "shifted"),
        "unknown": rejected(tasks[num_known:], "test"),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Compare kinds of signatures on many tasks; writes JSON and a figure."
    )
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    result = run_study(
        RetrievalSettings.of(yaml.safe_load(arguments.config.read_text(encoding="utf-8"))), arguments.out
    )
    for kind in result["kinds"]:
        last = kind["sizes"][-1]
        print(
            f"{kind['kind']}: {last['accuracy']:.2f} % of {last['tasks']} tasks, {last['retrieve_ms']:.2f} ms"
        )


if __name__ == "__main__":
    main()
