"""Evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trace_dist.config.checks import Section


@dataclass(frozen=True)
class EvalConfig(Section):
    """Evaluation."""

    section: ClassVar[str] = "eval"

    batch_size: int = 100
    """Prompts per generation batch on one rank."""
    max_new_tokens: int | None = None
    """Generation cap; derived from the longest reference answer when not set."""

    def check(self) -> None:
        self.at_least(1, "batch_size", "max_new_tokens")
