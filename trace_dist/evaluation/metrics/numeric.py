"""Metric numeric: the last number that was said is the last one of a reference.

A number may have a sign, thousands in groups of three (``1,234.5``), decimals, an exponent and a percent sign, which is left out.
A reference without a number is compared as text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from trace_dist.config.checks import Section

label = "last number"
_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-+])?(?<![\d.])"
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d|,\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE][-+]?\d+)?"
)  # fmt: skip
"""A minus after a letter, a digit or a bracket is a hyphen or an operator."""


@dataclass(frozen=True)
class Options(Section):
    """Of ``numeric``."""

    section: ClassVar[str] = "tasks.metric_options"

    tolerance: float = 1e-6
    """How far the numbers may differ, as a share of the larger one, or absolutely."""

    def check(self) -> None:
        self.at_least(0, "tolerance")


def score(said: str, references: Sequence[str], prompt: str, options: Options) -> float:
    """1 or 0."""
    return float(any(_same(said, reference, options.tolerance) for reference in references))


def _same(said: str, reference: str, tolerance: float) -> bool:
    found, wanted = last_number(said), last_number(reference)
    if wanted is None:
        return said.strip() == reference.strip()
    return found is not None and math.isclose(found, wanted, rel_tol=tolerance, abs_tol=tolerance)


def last_number(text: str) -> float | None:
    """The last number of a text; None without one."""
    found = _NUMBER.findall(text.replace("\u2212", "-"))
    return float(found[-1].replace(",", "")) if found else None
