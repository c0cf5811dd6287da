"""Deltas and retrieval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trace_dist.config.checks import Section


@dataclass(frozen=True)
class BankConfig(Section):
    """Deltas and retrieval (PROTEUS, arXiv 2603.13235)."""

    section: ClassVar[str] = "bank"

    path: str | None = None
    """Folder of the bank that tasks are learned into (`--bank DIR` for short); `<run_dir>/bank` when not set."""
    clusters: int = 4
    """Largest number of clusters per task; the number used is chosen by held-out likelihood."""
    num_prompts: int = 400
    """Training prompts per task from which a signature is made."""
    layer: int = -1
    """Hidden layer whose mean over the prompt's tokens represents it (-1 is the last)."""

    keep_prompts: int = 1000
    """Training prompts per task that the bank keeps, without their answers, so that it can be folded into one set of weights
    later (`consolidate`); 0 keeps none. Of general sets of running text the text itself is kept."""

    def check(self) -> None:
        self.at_least(1, "clusters", "num_prompts")
        self.at_least(0, "keep_prompts")
