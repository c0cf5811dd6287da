"""A score: the result of an evaluation, equal on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Score:
    """A result over all ranks, equal on every rank.

    ``value``: percent (higher is better), or bits per byte for text (lower is better).
    ``per_example``: in the order of the examples; in [0, 1], 1.0 or 0.0 for accuracies, or bits per byte for text.
    ``answers``: what was said to each example, in the same order, or the label that was taken; empty where nothing is answered.
    """

    value: float
    num: int
    per_example: list[float]
    answers: list[str] = field(default_factory=list)


def mean_score(scores: Sequence[float], answers: Sequence[str]) -> Score:
    """The mean of scores in [0, 1], in percent, and the answers that have them."""
    each = [float(score) for score in scores]
    return Score(100 * sum(scores) / len(scores), len(scores), each, list(answers))
