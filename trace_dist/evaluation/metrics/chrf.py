"""Metric chrf: F-score of character n-grams (Popovic, chrF, WMT 2015), sentence by sentence, by sacrebleu."""

from __future__ import annotations

from collections.abc import Sequence

label = "chrF"
requires = "sacrebleu"


def score(said: str, references: Sequence[str], prompt: str) -> float:
    """The best chrF of all references."""
    from sacrebleu import sentence_chrf

    return max(sentence_chrf(said, [reference]).score / 100 for reference in references)
