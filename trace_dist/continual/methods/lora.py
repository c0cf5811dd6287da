"""``lora``: PEFT LoRA on every linear layer, task after task on the same adapters, for comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from trace_dist.config.checks import Rate, Section
from trace_dist.continual.methods.dense import Dense
from trace_dist.masks.ops import layouts_for
from trace_dist.models.adapters import lora_rank


@dataclass(frozen=True)
class Options(Section):
    """Of ``lora``."""

    section: ClassVar[str] = "continual.options.lora"

    lr: Rate | None = None
    """Peak learning rate, or `auto`; as `train.lr` when not set."""
    rank: int | None = None
    """Rank of the adapters; when not set, the one that trains as many parameters as a task's mask."""

    def check(self) -> None:
        self.rates("lr")
        self.at_least(1, "rank")


class LoRA(Dense):
    """Low-rank adapters."""

    label = "LoRA"
    colour = "pink"

    def prepare(self, module: Any) -> nn.Module:
        from peft import LoraConfig, get_peft_model  # slow to import, and needed here alone

        self.rank = self.options.rank or lora_rank(module, self._entries(module))
        torch.manual_seed(self.setting.cfg.seed)  # the adapters' random halves
        config = LoraConfig(
            r=self.rank, lora_alpha=2 * self.rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        return get_peft_model(module, config)

    def _entries(self, module: nn.Module) -> float:
        """Entries of a mask of the run's density."""
        mask = self.setting.cfg.mask
        layouts = layouts_for(module, "element", 1, mask.maskable)
        return mask.density * sum(layout.numel for layout in layouts.values())

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "lora_rank": self.rank}


METHOD = LoRA
