"""``full``: full fine-tuning, task after task. What a user without masks would do, for comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from trace_dist.config.checks import Rate, Section
from trace_dist.continual.methods.dense import Dense


@dataclass(frozen=True)
class Options(Section):
    """Of ``full``."""

    section: ClassVar[str] = "continual.options.full"

    lr: Rate | None = None
    """Peak learning rate, or `auto`; as `train.lr` when not set."""

    def check(self) -> None:
        self.rates("lr")


class Full(Dense):
    """Full fine-tuning."""

    label = "full fine-tuning"
    colour = "vermillion"

    def prepare(self, module: Any) -> nn.Module:
        return module


METHOD = Full
