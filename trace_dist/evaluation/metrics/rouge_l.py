"""Metric rouge_l: F1 of the longest common subsequence of words (Lin, ROUGE, 2004), by rouge-score.

rouge-score's own words are runs of ASCII letters and digits, so that a text in another script has none. Here a word is a run of
any letters and digits with their marks, and each character of a script that is written without spaces (Chinese, Japanese, Korean,
Thai, Lao, Burmese, Khmer) is one; of ASCII texts the words are the same. Marks are vowels in many scripts: without them
different words of Hindi would be equal.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache as once
from typing import Any

label = "ROUGE-L"
requires = "rouge_score"
_CHARACTER = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_PLANES = 0x20000
"""Above it no marks of letters are."""


class _Words:
    """What rouge-score calls a tokenizer."""

    def __init__(self) -> None:
        marks = "".join(
            each for each in map(chr, range(_PLANES)) if unicodedata.category(each).startswith("M")
        )
        letter, any_marks = rf"(?![{_CHARACTER}{marks}])[^\W_]", f"[{marks}]*"
        self._word = re.compile(rf"[{_CHARACTER}]{any_marks}|(?:{letter}{any_marks})+")

    def tokenize(self, text: str) -> list[str]:
        # Composed, so that a letter with its accent is the same as the two one after the other.
        return self._word.findall(unicodedata.normalize("NFC", text.lower()))


def score(said: str, references: Sequence[str], prompt: str) -> float:
    """The best F1 of all references."""
    return max(float(_scorer().score(reference, said)["rougeL"].fmeasure) for reference in references)


@once
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())
