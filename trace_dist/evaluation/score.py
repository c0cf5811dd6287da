"""A score: the result of an evaluation, equal on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """A result over all ranks, equal on every rank.

    ``value``: percent for accuracies (higher is better), bits per byte for text (lower is better).
    ``per_example``: in the order of the examples; 1.0 or 0.0 for accuracies, bits per byte for text.
    """

    value: float
    num: int
    per_example: list[float]


def accuracy(right: Sequence[bool]) -> Score:
    """Percent of examples that are right."""
    return Score(100 * sum(right) / len(right), len(right), [float(each) for each in right])
