"""Metric bleu: BLEU (Papineni et al., 2002) sentence by sentence, by sacrebleu.

The mean over sentences is not the BLEU of a corpus, whose n-grams are counted together: that has no score of an example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache as once
from typing import Any, ClassVar

from trace_dist.config.checks import Section, check

label = "BLEU of sentences"
requires = "sacrebleu"
_WORDS = ("13a", "intl", "zh", "char", "none")


@dataclass(frozen=True)
class Options(Section):
    """Of ``bleu``."""

    section: ClassVar[str] = "tasks.metric_options"

    tokenize: str = "13a"
    """sacrebleu's words: 13a, intl, zh (Chinese), char, none."""

    def check(self) -> None:
        name, rule = f"{self.where}.tokenize", f"must be one of {', '.join(_WORDS)}"
        check(self.tokenize in _WORDS, name, self.tokenize, rule, "choose one")


def score(said: str, references: Sequence[str], prompt: str, options: Options) -> float:
    """The best BLEU of all references."""
    bleu = _bleu(options.tokenize)
    return max(min(1.0, bleu.sentence_score(said, [reference]).score / 100) for reference in references)


@once
def _bleu(tokenize: str) -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize=tokenize, effective_order=True)
