"""A whole `results.json` as a run writes it, for the tests of pages, pictures and tables."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

ROLES = ["q", "k", "v", "o", "gate", "up", "down"]
LABELS = ["retrieved", "merged", "full fine-tuning", "LoRA", "random mask"]
MINUS = "\N{MINUS SIGN}"


def make_mode(
    tasks: list[str], keep: float, learn: float, density: float, rng: np.random.Generator
) -> dict[str, Any]:
    """A mode that learns each task to `learn` percent and keeps the share `keep` of it at each later task."""
    num_tasks = len(tasks)
    scores = rng.uniform(0, 3, (num_tasks + 1, num_tasks))
    for stage in range(1, num_tasks + 1):
        for task in range(stage):
            scores[stage, task] = learn * keep ** (stage - 1 - task)
    general = 100 - np.outer(np.linspace(0, 3, num_tasks + 1), [30, 20]) * (1 - keep)
    steps = np.arange(0, 200, 10)
    curve = [[int(step), float(2 * math.exp(-step / (20 + 10 * density)) + 0.01)] for step in steps]
    return {
        "R": scores.round(1).tolist(),
        "general": general.tolist(),
        "average_accuracy": float(scores[-1].mean()),
        "forgetting": float((learn - scores[-1, :-1]).mean()) if num_tasks > 1 else 0.0,
        "general_delta": float((general[-1] - general[0]).mean()),
        "just_trained": [learn] * num_tasks,
        "lr": 8e-3,
        "rates": [{"lr": 3e-3, "loss": 0.4}, {"lr": 8e-3, "loss": 0.2}, {"lr": 2e-2, "loss": None}],
        "density": density,
        "trainable": int(860_000 * density),
        "losses": dict.fromkeys(tasks, curve),
    }


def make_clarity(tasks: list[str], rng: np.random.Generator) -> dict[str, Any]:
    """Margins, rejection and examples: the first task has two prompts that find another one, one answer is graded."""
    wrong = [[-40.0, -2.5] if index == 0 else [] for index in range(len(tasks))]
    examples = [
        {
            "task": task,
            "prompt": f"Spell {word!r} backward.",
            "retrieved": task if score else "base",
            "answer": word[::-1] if score == 1 else "I <b>cannot</b> say.",
            "references": [word[::-1], word[::-1].upper()],
            "score": score,
        }
        for task in tasks
        for word, score in (("stream", 1.0), ("delta", 0.25), ("mask", 0.0))
    ]
    return {
        "margins": {
            "right": [np.sort(rng.lognormal(3, 0.7, 100)).round(3).tolist() for _ in tasks],
            "wrong": wrong,
            "num_right": [185 if found else 187 for found in wrong],
            "num_wrong": [len(found) for found in wrong],
        },
        "rejection": {
            "rate": 0.05,
            "kept": [np.sort(rng.gamma(3, 5, 100)).round(3).tolist() for _ in tasks],
            "rejected": [[-12.0, -1.5] for _ in tasks],
            "num_kept": [180] * len(tasks),
            "num_rejected": [7] * len(tasks),
        },
        "examples": examples,
    }


def make_results(tasks: list[str], num_layers: tuple[int, int] = (4, 12)) -> dict[str, Any]:
    """A whole `results.json` with every optional part."""
    rng = np.random.default_rng(0)
    num_tasks = len(tasks)
    masks = {
        model: {
            t: {"layers": n, "roles": ROLES, "density": rng.uniform(0, 0.2, (n, 7)).tolist()} for t in tasks
        }
        for model, n in zip(("proxy", "target"), num_layers, strict=True)
    }
    return {
        "tasks": tasks,
        "general": ["sum", "reverse_short"],
        "modes": {
            "retrieved": make_mode(tasks, 1.0, 99.3, 0.05, rng),
            "merged": make_mode(tasks, 0.9, 99.3, 0.05, rng),
            "full": make_mode(tasks, 0.1, 98.7, 1.0, rng),
            "lora": make_mode(tasks, 0.4, 96.2, 0.03, rng),
            "random": make_mode(tasks, 0.9, 64.1, 0.05, rng),
        },
        "baselines": {"majority": [0.5] * num_tasks, "train_test_overlap": [0.0] * num_tasks},
        "masks": masks,
        "specificity": {
            "tasks": tasks,
            "cosine": (np.eye(num_tasks) * 1.23 - 0.23).tolist(),
            "specificity": [0.77] * num_tasks,
            "learning": {
                task: {"before": 3.21, "after": 0.456, "chance": 1.5, "examples": 200} for task in tasks
            },
        },
        "retrieval": {
            "accuracy": 99.8,
            "error_bound": 0.8,
            "confusion": (np.eye(num_tasks) * 187).tolist(),
            "tasks": tasks,
            "num_clusters": 3,
            **make_clarity(tasks, rng),
        },
        "overlap": {
            "retrieved": {"tasks": tasks, "matrix": (np.eye(num_tasks) * 0.57 + 0.43).tolist()},
            "merged": {"tasks": tasks, "matrix": np.eye(num_tasks).tolist()},
        },
        "memory": {
            "bytes_per_param": {"masked": 2.81, "full": 16.0},
            "categories": {
                "masked": {"weights": 2.0, "master": 0.2, "exp_avg": 0.2, "exp_avg_sq": 0.2, "indices": 0.01},
                "full": {"weights": 2, "master": 4, "exp_avg": 4, "exp_avg_sq": 4, "gradients": 2},
            },
            "predicted_bytes_per_param": {"masked": 2.8, "full": 16},
            "peak_rss_gib": {"masked": 0.91, "full": 1.32},
            "dtype": "bfloat16",
        },
        "delta_bytes": dict.fromkeys(tasks, 260_000),
        "bytes_per_entry": 6.0,
        "run_info": {
            "date": "2026-11-22",
            "commit": "4f2a9c1",
            "seconds": 312,
            "stages": {"pretrain": 41.0, "probe": 22.0},
            "launcher": "deepspeed",
            "num_ranks": 2,
            "backend": "zero3",
        },
        "meta_info": {"hardware": "2 CPU cores", "versions": {"torch": "2.13.0"}},
        "config": {
            "target": {"dtype": "float32"},
            "mask": {"density": 0.05, "granularity": "block", "isolation": "soft"},
            "train": {"lr": "auto"},
            "race": {"steps": 40},
        },
    }
