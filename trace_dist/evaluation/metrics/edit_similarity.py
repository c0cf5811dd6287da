"""Metric edit_similarity: rapidfuzz's ratio, 1 - (insertions and deletions) / (characters of both texts).

It is what the TRACE benchmark (arXiv 2310.06762) and CodeXGLUE call the edit similarity of completed code.
"""

from __future__ import annotations

from collections.abc import Sequence

label = "edit similarity"
requires = "rapidfuzz"


def score(said: str, references: Sequence[str], prompt: str) -> float:
    """The largest similarity of all references."""
    from rapidfuzz.fuzz import ratio

    return max(float(ratio(said, reference)) / 100 for reference in references)
