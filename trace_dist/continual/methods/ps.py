"""``ps``: full fine-tuning that keeps the signs of earlier updates, and merges by magnitude, after PS-LoRA (arXiv 2512.08960).

    loss + strength * sum over entries i of max(0, -(w_i - start_i) * past_i)

``past`` is the update of the tasks before. To move an entry against it costs; to move it further does not. When the task is
trained, each entry keeps the update of larger magnitude, the past one or the new one. The paper does so to the products of
adapters, with penalties of its own form; here it is done to the weights themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trace_dist.continual.methods.penalised import Penalised, Strength
from trace_dist.train.learner import DenseLearner
from trace_dist.train.workbench import Stream


@dataclass(frozen=True)
class Options(Strength):
    """Of ``ps``."""

    section: ClassVar[str] = "continual.options.ps"

    strength: float = 1.0
    """Factor of the penalty, in 1 / (change of a weight)^2; without it updates are still merged by magnitude."""


class PS(Penalised):
    """Parameter stability."""

    label = "PS"

    @torch.no_grad()
    def end(self, stream: Stream, learner: DenseLearner) -> None:
        moved, past = self.moved(), self.memory
        self.memory = {name: larger(value, past[name]) if past else value for name, value in moved.items()}
        for name, parameter in self.trained().items() if past else ():
            start = self._start[name]
            parameter.copy_(
                torch.where(self.memory[name] == past[name], start, start - past[name] + moved[name])
            )

    @staticmethod
    def slope(moved: Tensor, memory: Tensor) -> Tensor:
        return -memory * (moved * memory < 0)


def larger(new: Tensor, past: Tensor) -> Tensor:
    """Entry by entry, the update of larger magnitude; the past one where they are equal."""
    return torch.where(new.abs() > past.abs(), new, past)


METHOD = PS
