"""One set of weights: every task continues from the last, a small share of each batch is replayed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trace_dist.config.checks import Section, check

label, colour, masked, on_ranks = "merged", "sky", True, True


@dataclass(frozen=True)
class Options(Section):
    """Options of the method."""

    section: ClassVar[str] = "continual.options.merged"

    replay: float = 0.1
    """Share of each batch drawn from earlier tasks and the general tasks."""
    replay_memory: float = 0.01
    """Share of the training examples of each of those tasks that is kept for replay."""

    def check(self) -> None:
        inside, cure = 0 <= self.replay < 1, "use for example 0.01"
        check(inside, f"{self.where}.replay", self.replay, "must lie in [0, 1)", cure)
        kept = self.replay_memory
        check(0 < kept <= 1, f"{self.where}.replay_memory", kept, "must lie in (0, 1]", "use 0.01")
