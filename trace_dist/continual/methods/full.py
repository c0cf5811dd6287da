"""``full``: full fine-tuning, task after task. What a user without masks would do, for comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from trace_dist.continual.methods.base import require_rate
from trace_dist.continual.methods.dense import Dense


@dataclass(frozen=True)
class Options:
    """Of ``full``."""

    lr: float = 1e-3
    """Peak learning rate."""

    def __post_init__(self) -> None:
        require_rate("full.lr", self.lr)


class Full(Dense):
    """Full fine-tuning."""

    label = "full fine-tuning"
    colour = "vermillion"

    def prepare(self, module: Any) -> nn.Module:
        return module


METHOD = Full
