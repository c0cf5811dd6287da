"""``slao``: one LoRA for all tasks, into which each task's is merged with weight 1 / sqrt(t) (SLAO, arXiv 2512.23017).

The t-th task begins with B as the task before left it, and with an orthonormal basis of what its A spans (the Q of its QR
decomposition). When it is trained, its A replaces the merged one, and

    B_merged <- B_merged + (B - B_merged) / sqrt(t)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trace_dist.config.checks import check
from trace_dist.continual.methods import lora
from trace_dist.train.learner import DenseLearner
from trace_dist.train.workbench import Stream


@dataclass(frozen=True)
class Options(lora.Options):
    """Of ``slao``: those of ``lora``."""

    section: ClassVar[str] = "continual.options.slao"


class SLAO(lora.LoRA):
    """Continual merging into one LoRA. ``memory`` holds the last task's own B."""

    label = "SLAO"

    def prepare(self, module: Any) -> nn.Module:
        adapted = super().prepare(module)
        widths = [p.shape[1] for name, p in adapted.named_parameters() if lora.is_a(name)]
        rule = f"must be at most {min(widths)}, the inputs of the narrowest layer that is adapted"
        check(self.rank <= min(widths), "continual.options.slao.rank", self.rank, rule, "lower it")
        return adapted

    @torch.no_grad()
    def begin(self, stream: Stream) -> None:
        self._merged = {
            name: each.detach().clone() for name, each in self.trained().items() if not lora.is_a(name)
        }
        if self.memory:
            for name, parameter in self.trained().items():
                parameter.copy_(orthonormal(parameter) if lora.is_a(name) else self.memory[name])

    @torch.no_grad()
    def end(self, stream: Stream, learner: DenseLearner) -> None:
        number = len(self.setting.bench.upto(stream))
        trained = self.trained()
        self.memory = {name: trained[name].detach().clone() for name in self._merged}
        for name, merged in self._merged.items():
            trained[name].copy_(merged + (trained[name] - merged) / math.sqrt(number))


def orthonormal(a: Tensor) -> Tensor:
    """[rank, inputs] orthonormal rows that span those of ``a``."""
    return torch.linalg.qr(a.T).Q.T


METHOD = SLAO
