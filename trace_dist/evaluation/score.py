"""A score: the result of an evaluation, equal on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """A result over all ranks, equal on every rank.

    ``value``: percent (higher is better), or bits per byte for text (lower is better).
    ``per_example``: in the order of the examples; in [0, 1], 1.0 or 0.0 for accuracies, or bits per byte for text.
    """

    value: float
    num: int
    per_example: list[float]


def mean_score(scores: Sequence[float]) -> Score:
    """The mean of scores in [0, 1], in percent."""
    return Score(100 * sum(scores) / len(scores), len(scores), [float(each) for each in scores])
