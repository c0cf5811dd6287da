"""Metric numeric: the last number that was said is the last one of a reference.

A number may have a sign, thousands in groups of three (``1,234.5``), decimals, an exponent, and a sign of percent or money, which
is left out. Two integers without an exponent are the same where all digits are, unless a tolerance is given; a number too large
for a float is the same as itself alone. A reference without a number is compared as text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import ClassVar

from trace_dist.config.checks import Section

label = "last number"
_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-+])?(?<![\d.])"
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d|,\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE][-+]?\d+)?"
)  # fmt: skip
"""A minus after a letter, a digit or a bracket is a hyphen or an operator."""
_CURRENCY = re.compile(r"(?<=[-+])[$\u20ac\u00a3\u00a5\u20b9](?=[\d.])")
"""A sign of money between the sign of a number and its digits."""
_INTEGER = re.compile(r"[-+]?\d+")
_ROUNDING = 1e-6
"""Tolerance of numbers that are not both integers, where none is given."""


@dataclass(frozen=True)
class Options(Section):
    """Of ``numeric``."""

    section: ClassVar[str] = "tasks.metric_options"

    tolerance: float | None = None
    """How far the numbers may differ, as a share of the larger one, or absolutely; when None, 1e-6 and for integers 0."""

    def check(self) -> None:
        self.at_least(0, "tolerance")


def score(said: str, references: Sequence[str], prompt: str, options: Options) -> float:
    """1 or 0."""
    return float(any(_same(said, reference, options.tolerance) for reference in references))


def _same(said: str, reference: str, tolerance: float | None) -> bool:
    found, wanted = last_number(said), last_number(reference)
    if wanted is None:
        return said.strip() == reference.strip()
    if found is None or found == wanted:
        return found is not None
    if tolerance is None and _INTEGER.fullmatch(found) and _INTEGER.fullmatch(wanted):
        return Decimal(found) == Decimal(wanted)
    return _close(float(found), float(wanted), _ROUNDING if tolerance is None else tolerance)


def _close(one: float, other: float, tolerance: float) -> bool:
    """False where one is too large for a float, and so infinite."""
    finite = math.isfinite(one) and math.isfinite(other)
    return finite and math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance)


def last_number(text: str) -> str | None:
    """The last number of a text, without commas; None without one."""
    found = _NUMBER.findall(_CURRENCY.sub("", text.replace("\u2212", "-")))
    return found[-1].replace(",", "") if found else None
