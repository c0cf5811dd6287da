"""Scores that compare a task with others, from running sums: no more than three models of scores are held, however many tasks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trace_dist.parts import SCORES

Scores = Mapping[str, Tensor]


def contrasts(score: str) -> bool:
    """Whether a score compares tasks."""
    return hasattr(SCORES.load(score), "contrast")


class Contrast:
    """The scores of all tasks together.

    Args:
        score: one that ``contrasts``.
    """

    def __init__(self, score: str) -> None:
        self._part = SCORES.load(score)
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, scores: Scores) -> None:
        """Take part in the comparison; every task and general set once."""
        for name, values in _over_mean(scores).items():
            self._sums[name] = self._sums[name] + values if name in self._sums else values
        self._count += 1

    def of(self, scores: Scores) -> dict[str, Tensor]:
        """The scores of one that was added: parameter -> [num_units] fp32."""
        own = _over_mean(scores)
        others = {
            name: ((self._sums[name] - values) / (self._count - 1)).clamp(min=0)
            for name, values in own.items()
        }
        found: dict[str, Tensor] = self._part.contrast(own, others)
        return found


def _over_mean(scores: Scores) -> dict[str, Tensor]:
    """Scores over their mean over all units, fp64; zeros stay zeros."""
    total = sum(float(values.double().sum()) for values in scores.values())
    mean = total / sum(len(values) for values in scores.values())
    if mean == 0:
        return {name: torch.zeros_like(values, dtype=torch.float64) for name, values in scores.items()}
    return {name: values.double() / mean for name, values in scores.items()}
