"""Metric exact_match: what was said is a reference, without outer white space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from trace_dist.config.checks import Section

label = "exact match"


@dataclass(frozen=True)
class Options(Section):
    """Of ``exact_match``."""

    section: ClassVar[str] = "tasks.metric_options"

    first: int | None = None
    """Characters that are compared; all of them when not set. 1 compares the letter of answers that go on with a reason."""

    def check(self) -> None:
        self.at_least(1, "first")


def score(said: str, references: Sequence[str], prompt: str, options: Options) -> float:
    """1 or 0."""
    return float(said[: options.first] in [reference[: options.first] for reference in references])
