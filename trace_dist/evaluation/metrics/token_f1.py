"""Metric token_f1: overlap of words after SQuAD's normalisation (Rajpurkar et al., arXiv 1606.05250, section 6.1).

    F1 = 2 |said and reference| / (|said| + |reference|), words counted as often as they stand there

Normalised texts are in lower case, without ASCII punctuation and without the words a, an and the. Of two texts without words
(SQuAD 2.0's unanswerable questions) both or neither must be empty.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

label = "token F1"
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score(said: str, references: Sequence[str], prompt: str) -> float:
    """The best F1 of all references."""
    return max(_f1(words(said), words(reference)) for reference in references)


def words(text: str) -> list[str]:
    """Words of a text after SQuAD's normalisation."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def _f1(said: list[str], reference: list[str]) -> float:
    if not said or not reference:
        return float(said == reference)
    shared = sum((Counter(said) & Counter(reference)).values())
    return 2 * shared / (len(said) + len(reference))
