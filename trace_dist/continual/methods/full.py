"""Sequential full fine-tuning, dense, in one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trace_dist.config.checks import Section

label, colour, masked, on_ranks = "full fine-tuning", "vermillion", False, False


@dataclass(frozen=True)
class Options(Section):
    """Options of the method."""

    section: ClassVar[str] = "continual.options.full"

    lr: float = 1e-3
    """Peak learning rate."""

    def check(self) -> None:
        self.positive("lr")
