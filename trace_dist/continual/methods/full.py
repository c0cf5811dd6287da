"""``full``: full fine-tuning, task after task. What a user without masks would do, for comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from trace_dist.continual.methods.dense import Dense
from trace_dist.continual.methods.options import Replayed


@dataclass(frozen=True)
class Options(Replayed):
    """Of ``full``."""

    section: ClassVar[str] = "continual.options.full"


class Full(Dense):
    """Full fine-tuning."""

    label = "full fine-tuning"
    colour = "vermillion"

    def prepare(self, module: Any) -> nn.Module:
        return module


METHOD = Full
