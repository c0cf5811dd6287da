"""A task: its examples, how it is scored, and what a trivial answer would score."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import datasets

from trace_dist.config import TaskConfig
from trace_dist.data.sources import Example, load_examples


@dataclass(frozen=True)
class Task:
    """Examples with string columns ``prompt`` and ``answer``, and the baselines a score is read against."""

    name: str
    train: datasets.Dataset
    test: datasets.Dataset
    choices: list[str] | None  # not None iff metric == "choice"
    metric: Literal["exact_match", "choice", "bits_per_byte"]
    majority_percent: float
    """Test accuracy of always giving the most common training answer."""
    overlap_percent: float
    """Share of the test examples whose prompt is in the training set."""


def load_task(cfg: TaskConfig, seed: int) -> Task:
    """Load a task's examples and work out its baselines.

    Raises:
        ValueError: as ``load_examples``; or metric "choice" with fewer than two distinct answers.
    """
    splits = load_examples(cfg, seed)
    return Task(
        name=cfg.name,
        train=datasets.Dataset.from_list(splits.train),
        test=datasets.Dataset.from_list(splits.test),
        choices=_choices([*splits.train, *splits.test], cfg.name) if cfg.metric == "choice" else None,
        metric=cfg.metric,
        majority_percent=_majority_percent(splits.train, splits.test),
        overlap_percent=_overlap_percent(splits.train, splits.test),
    )


def _choices(examples: list[Example], name: str) -> list[str]:
    choices = sorted({example["answer"] for example in examples})
    if len({choice.strip() for choice in choices}) < 2:
        raise ValueError(f"tasks.{name}.metric='choice': all answers are {choices}; use metric exact_match")
    return choices


def _majority_percent(train: list[Example], test: list[Example]) -> float:
    counts = Counter(example["answer"].strip() for example in train)
    # Ties are broken by the text, not by the order of the examples, so that every seed agrees.
    majority = max(counts, key=lambda answer: (counts[answer], answer))
    return 100 * sum(example["answer"].strip() == majority for example in test) / len(test)


def _overlap_percent(train: list[Example], test: list[Example]) -> float:
    seen = {example["prompt"] for example in train}
    return 100 * sum(example["prompt"] in seen for example in test) / len(test)
