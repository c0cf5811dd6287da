"""``ella``: full fine-tuning, with a penalty on moving what earlier tasks moved (ELLA, arXiv 2601.02232).

    loss + strength * sum over entries i of ((w_i - start_i) * past_i)^2

``past`` is the sum of the earlier tasks' updates. Entries that they moved far hardly move again, all others are free. The paper
does so to the products of adapters; here it is done to the weights themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trace_dist.continual.methods.penalised import Penalised, Strength
from trace_dist.train.learner import DenseLearner
from trace_dist.train.workbench import Stream


@dataclass(frozen=True)
class Options(Strength):
    """Of ``ella``."""

    section: ClassVar[str] = "continual.options.ella"

    strength: float = 1e3
    """Factor of the penalty, in 1 / (change of a weight)^4; 0 is full fine-tuning."""


class ELLA(Penalised):
    """Penalty on the overlap of updates."""

    label = "ELLA"

    def end(self, stream: Stream, learner: DenseLearner) -> None:
        self.memory = {name: value + self.memory.get(name, 0.0) for name, value in self.moved().items()}

    @staticmethod
    def slope(moved: Tensor, memory: Tensor) -> Tensor:
        return 2 * memory.square() * moved


METHOD = ELLA
