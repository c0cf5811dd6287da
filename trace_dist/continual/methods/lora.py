"""``lora``: PEFT LoRA on every linear layer, task after task on the same adapters, for comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trace_dist.continual.methods.adapted import Adapted, rank_for
from trace_dist.continual.methods.options import LowRank, Replayed


@dataclass(frozen=True)
class Options(LowRank, Replayed):
    """Of ``lora``."""

    section: ClassVar[str] = "continual.options.lora"


class LoRA(Adapted):
    """Low-rank adapters."""

    label = "LoRA"
    colour = "pink"

    def config(self, module: Any) -> Any:
        from peft import LoraConfig  # slow to import, and needed here alone

        self.rank = self.options.rank or rank_for(module, self.setting.cfg.mask)
        adapted = self.setting.bench.modality.lora(module)
        return LoraConfig(r=self.rank, lora_alpha=2 * self.rank, **adapted)

    def prepare(self, module: Any) -> nn.Module:
        torch.manual_seed(self.setting.cfg.seed)  # the adapters' random halves
        adapted = super().prepare(module)
        self._new = {
            name: each.detach().clone() for name, each in adapted.named_parameters() if each.requires_grad
        }
        return adapted

    def renew(self) -> None:
        """Make the adapters what they were at first: they add nothing."""
        self.put(self._new)

    @torch.no_grad()
    def put(self, adapters: Mapping[str, Tensor]) -> None:
        """Make those that are given others, by name."""
        trained = self.trained()
        for name, value in adapters.items():
            trained[name].copy_(value)
        # Mixed precision keeps weights that it has rounded until its block ends, and scores several tasks in one.
        torch.clear_autocast_cache()

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "lora_rank": self.rank}


def is_adapter(name: str) -> bool:
    """Whether a parameter is an adapter's; others are trained whole."""
    return is_a(name) or ".lora_B." in name


def is_a(name: str) -> bool:
    """Whether an adapter's parameter is its A [rank, inputs]; the other one is B [outputs, rank]."""
    return ".lora_A." in name


METHOD = LoRA
