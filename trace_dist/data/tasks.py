"""A task: its examples, how it is scored, and what a trivial answer would score."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import datasets

from trace_dist.config import TaskConfig
from trace_dist.data.examples import Example, as_dataset, prompt_key, references_of
from trace_dist.data.sources import load_examples


@dataclass(frozen=True)
class Task:
    """Examples as rows (data/examples.py), and the baselines a score is read against."""

    name: str
    train: datasets.Dataset
    test: datasets.Dataset
    choices: list[str] | None  # not None iff metric == "choice"
    metric: str
    majority_percent: float
    """Share of the test examples that the most common training answer is right for, whatever the metric."""
    overlap_percent: float
    """Share of the test examples whose prompt is in the training set."""
    metric_options: dict[str, Any] = field(default_factory=dict)
    validation: datasets.Dataset | None = None  # not None iff the run validates
    among: list[str] | None = None
    """Answers among which one is chosen, where the weights that answer have learned these alone; None for all of them."""
    list_name: str = "tasks"
    """The list of the run that it stands in; that of the general sets is ``general``."""

    @property
    def where(self) -> str:
        """How errors call it."""
        return f"{self.list_name}.{self.name}"

    @cached_property
    def answers(self) -> list[str]:
        """What is answered in its training examples, each once, sorted."""
        return sorted(set(self.train["answer"][:]))

    @property
    def parts(self) -> list[datasets.Dataset]:
        """All of its examples: those to train, to test and, where there are some, to validate on."""
        return [part for part in (self.train, self.test, self.validation) if part is not None]


def load_task(cfg: TaskConfig, seed: int, validate: bool = False) -> Task:
    """Load a task's examples, with those to validate on where they are wanted, and work out its baselines.

    Raises:
        ValueError: as ``load_examples``; or metric "choice" with fewer than two distinct answers.
    """
    splits = load_examples(cfg, seed, validate)
    everything = [*splits.train, *splits.test, *splits.validation]
    return Task(
        name=cfg.name,
        train=as_dataset(splits.train),
        test=as_dataset(splits.test),
        choices=_choices(everything, cfg.where) if cfg.metric == "choice" else None,
        metric=cfg.metric,
        majority_percent=_majority_percent(splits.train, splits.test),
        overlap_percent=_overlap_percent(splits.train, splits.test),
        metric_options=cfg.metric_options,
        validation=as_dataset(splits.validation) if validate else None,
        list_name=cfg.list_name,
    )


def _choices(examples: list[Example], where: str) -> list[str]:
    choices = sorted({answer for example in examples for answer in references_of(example)})
    if len({choice.strip() for choice in choices}) < 2:
        raise ValueError(f"{where}.metric='choice': all answers are {choices}; use metric exact_match")
    return choices


def _majority_percent(train: list[Example], test: list[Example]) -> float:
    counts = Counter(example["answer"].strip() for example in train)
    # Ties are broken by the text, not by the order of the examples, so that every seed agrees.
    majority = max(counts, key=lambda answer: (counts[answer], answer))
    right = [majority in (answer.strip() for answer in references_of(example)) for example in test]
    return 100 * sum(right) / len(test)


def _overlap_percent(train: list[Example], test: list[Example]) -> float:
    seen = {prompt_key(example["prompt"]) for example in train}
    return 100 * sum(prompt_key(example["prompt"]) in seen for example in test) / len(test)
