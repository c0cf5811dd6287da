"""``ewc``: elastic weight consolidation (arXiv 1612.00796): full fine-tuning, with a penalty where earlier tasks need a weight.

    loss + strength / 2 * sum over entries i of F_i * (w_i - start_i)^2

``start`` is what the tasks before left. ``F`` is the diagonal of their Fisher information: the mean over training examples of the
squared gradient of an example's loss, after its task, added up over the tasks. So one quadratic stands for all of them, as in
online EWC (arXiv 1805.06370), whatever their number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trace_dist.continual.methods.penalised import Penalised, Strength
from trace_dist.probe.warm_start import mean_gradients
from trace_dist.train.learner import DenseLearner
from trace_dist.train.workbench import Stream


@dataclass(frozen=True)
class Options(Strength):
    """Of ``ewc``."""

    section: ClassVar[str] = "continual.options.ewc"

    strength: float = 1e4
    """Factor of the penalty, in 1 / F; 0 is full fine-tuning."""
    examples: int = 200
    """Training examples of each task that its Fisher information is measured on, one by one."""

    def check(self) -> None:
        super().check()
        self.at_least(1, "examples")


class EWC(Penalised):
    """Elastic weight consolidation."""

    label = "EWC"

    def end(self, stream: Stream, learner: DenseLearner) -> None:
        learner.module.eval()
        examples = self.setting.bench.batches([stream], 1)
        _, fisher = mean_gradients(learner, self.trained(), examples, self.options.examples)
        self.memory = {name: value + self.memory.get(name, 0.0) for name, value in fisher.items()}

    @staticmethod
    def slope(moved: Tensor, memory: Tensor) -> Tensor:
        return memory * moved


METHOD = EWC
