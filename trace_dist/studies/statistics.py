"""Paired differences with intervals.

[Note: intervals] Two arms answer the same test examples. A draw takes the examples of a task with replacement; the difference
is that of the nats per answer token. Where an arm was trained with several seeds, a draw also moves its mean over them, by as
much as the seeds leave it in doubt: along their own deviations, in steps of Student's t. Resampling a few seeds with
replacement would not do: of two seeds it finds the true mean in every second interval, and not in 95 % of them. 95 % of the
draws make the interval. With one seed the interval knows nothing of how masks and orders differ, and says so by ``seeds``.
Over several tasks the differences of the same draw are averaged: the tasks are fixed, no sample of all tasks. Seeds of
different tasks and arms are trainings of their own, whose spread is taken to be alike. Where they are runs through all tasks
(``paired``), a draw moves all of them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
LEVEL = 95.0
"""Percent of the draws in an interval."""
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """What an arm says to a task's test examples.

    Attributes:
        nats: [seeds, examples].
        tokens: answer tokens, [examples].
    """

    nats: Array
    tokens: Array

    @property
    def loss(self) -> float:
        """Nats per answer token, over seeds."""
        return float(self.nats.mean(0).sum() / self.tokens.sum())


@dataclass(frozen=True)
class Estimate:
    """A number with its interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, draws: Array) -> Estimate:
        """From the draws."""
        edge = (100 - LEVEL) / 2
        low, high = np.percentile(draws, [edge, 100 - edge])
        return cls(value, float(low), float(high))

    @property
    def verdict(self) -> str:
        """``lower``, ``higher`` or ``undecided``, beside zero."""
        return "lower" if self.high < 0 else "higher" if self.low > 0 else "undecided"

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"value": self.value, "low": self.low, "high": self.high}


def drawn(tasks: Sequence[Sequence[Answers]], paired: bool = False) -> list[list[Array]]:
    """Losses of some arms by task and arm, [draws] each; on a task they are of the same draws of examples.

    Args:
        tasks: the arms on each task, on the same examples.
        paired: whether the n-th seeds of all arms and tasks belong together.
    """
    counts = [len(arm.nats) for arms in tasks for arm in arms]
    if paired and len(set(counts)) > 1:
        raise AssertionError(f"runs are paired, but arms have {sorted(set(counts))} of them")
    free = counts[0] - 1 if paired else sum(count - 1 for count in counts)
    common = np.random.default_rng([len(tasks), DRAWS])
    width = np.sqrt(free / common.chisquare(free, (DRAWS, 1))) if free else np.ones((DRAWS, 1))
    runs = _moved(counts[0], common) if paired else None
    found: list[list[Array]] = []
    for number, arms in enumerate(tasks):
        generator = np.random.default_rng(number)
        tokens = arms[0].tokens
        count = len(tokens)
        examples = generator.multinomial(count, np.full(count, 1 / count), size=DRAWS).astype(np.float64)
        found.append([])
        for arm in arms:
            if len(arm.tokens) != count:
                raise AssertionError(f"arms answer {len(arm.tokens)} and {count} examples")
            moved = _moved(len(arm.nats), generator) if runs is None else runs
            nats = (1 / len(arm.nats) + width * moved) @ arm.nats
            found[-1].append((nats * examples).sum(1) / (examples @ tokens))
    return found


def _moved(seeds: int, generator: np.random.Generator) -> Array:
    """Factors of the seeds' values, [draws, seeds], adding up to 0: what they make varies as the mean of the seeds does."""
    factors = generator.standard_normal((DRAWS, seeds))
    factors -= factors.mean(1, keepdims=True)
    return factors / np.sqrt(max(seeds * (seeds - 1), 1))


def difference(pairs: Sequence[tuple[Answers, Answers]], paired: bool = False) -> Estimate:
    """Mean over tasks of the first arm's loss minus the second's.

    Args:
        pairs: per task, the answers of both.
        paired: as ``drawn``.
    """
    value = float(np.mean([first.loss - second.loss for first, second in pairs]))
    return Estimate.of(value, np.mean([first - second for first, second in drawn(pairs, paired)], axis=0))


def share_of_gain(triples: Sequence[tuple[Answers, Answers, Answers]]) -> Estimate:
    """How much of the gain of one arm over a reference another arm keeps, over tasks together: a ratio of mean gains.

    Args:
        triples: per task the answers of the reference, of the arm that gains, of the other one.
    """
    draws = drawn(triples)
    whole = np.mean([reference - best for reference, best, _ in draws], axis=0)
    kept = np.mean([reference - other for reference, _, other in draws], axis=0)
    losses = [[each.loss for each in triple] for triple in triples]
    reference, best, other = np.mean(losses, axis=0)
    # Where the gain may be nothing, the share may be anything; the interval shows it.
    return Estimate.of(float((reference - other) / (reference - best)), kept / whole)
