"""Metric rouge_l: F1 of the longest common subsequence of words (Lin, ROUGE, 2004), by rouge-score.

rouge-score's own words are runs of ASCII letters and digits, so that a text in another script has none. Here a word is a run of
any letters and digits, and each Chinese, Japanese or Korean character is one; of ASCII texts the words are the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache as once
from typing import Any

label = "ROUGE-L"
requires = "rouge_score"
_CHARACTER = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_CHARACTER}]|(?:(?![{_CHARACTER}])[^\W_])+")


class _Words:
    """What rouge-score calls a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


def score(said: str, references: Sequence[str], prompt: str) -> float:
    """The best F1 of all references."""
    return max(float(_scorer().score(reference, said)["rougeL"].fmeasure) for reference in references)


@once
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())
