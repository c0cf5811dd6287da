"""Sequential PEFT LoRA, dense, in one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trace_dist.config.checks import Section

label, colour, masked, on_ranks = "LoRA", "pink", False, False


@dataclass(frozen=True)
class Options(Section):
    """Options of the method."""

    section: ClassVar[str] = "continual.options.lora"

    lr: float = 3e-3
    """Peak learning rate."""
    rank: int | None = None
    """Rank; chosen to match the masked run's trainable entries when not set."""

    def check(self) -> None:
        self.positive("lr")
        self.at_least(1, "rank")
