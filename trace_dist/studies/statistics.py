"""Paired differences with bootstrap intervals.

[Note: intervals] Two arms answer the same test examples. A draw takes the examples of a task with replacement, and, where an arm
was trained with several seeds, its seeds with replacement; the difference is that of the nats per answer token. 95 % of the draws
make the interval. With one seed the interval knows nothing of how masks and orders differ, and says so by ``seeds``. Over
several tasks the differences of the same draw are averaged: the tasks are fixed, no sample of all tasks.
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
        """From the draws of a bootstrap."""
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


def drawn(arms: Sequence[Answers], seed: int, paired: bool = False) -> list[Array]:
    """Losses of some arms on one task, of the same draws of examples: [draws] each.

    Args:
        arms: on the same examples.
        seed: of the draws; tasks get different ones.
        paired: draw the same seeds for all arms, where their n-th seeds belong together.
    """
    generator = np.random.default_rng(seed)
    tokens = arms[0].tokens
    count = len(tokens)
    examples = generator.multinomial(count, np.full(count, 1 / count), size=DRAWS).astype(np.float64)
    found, weights = [], None
    for arm in arms:
        if len(arm.tokens) != count:
            raise AssertionError(f"arms answer {len(arm.tokens)} and {count} examples")
        seeds = len(arm.nats)
        if weights is None or not paired:
            weights = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=DRAWS) / seeds
        found.append(((weights @ arm.nats) * examples).sum(1) / (examples @ tokens))
    return found


def difference(pairs: Sequence[tuple[Answers, Answers]], paired: bool = False) -> Estimate:
    """Mean over tasks of the first arm's loss minus the second's.

    Args:
        pairs: per task, the answers of both.
        paired: as ``drawn``.
    """
    draws = [drawn(pair, number, paired) for number, pair in enumerate(pairs)]
    value = float(np.mean([first.loss - second.loss for first, second in pairs]))
    return Estimate.of(value, np.mean([first - second for first, second in draws], axis=0))


def share_of_gain(triples: Sequence[tuple[Answers, Answers, Answers]]) -> Estimate:
    """How much of the gain of one arm over a reference another arm keeps, over tasks together: a ratio of mean gains.

    Args:
        triples: per task the answers of the reference, of the arm that gains, of the other one.
    """
    draws = [drawn(triple, number) for number, triple in enumerate(triples)]
    whole = np.mean([reference - best for reference, best, _ in draws], axis=0)
    kept = np.mean([reference - other for reference, _, other in draws], axis=0)
    losses = [[each.loss for each in triple] for triple in triples]
    reference, best, other = np.mean(losses, axis=0)
    # Where the gain may be nothing, the share may be anything; the interval shows it.
    return Estimate.of(float((reference - other) / (reference - best)), kept / whole)
