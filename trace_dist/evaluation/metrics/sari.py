"""Metric sari: how well a text is simplified (Xu et al., Optimizing statistical machine translation for text simplification, TACL
2016, section 4). The mean of three scores, each the mean over n-grams of 1 to 4 words:

    keep    F1 of the n-grams of the source that were kept, against those that the references keep
    delete  precision of the n-grams that were left out, against those that the references leave out
    add     F1 of the n-grams that are new, against those that are new in the references

n-grams of source and output count once per reference. As in the implementation of the package ``evaluate``, which the TRACE
benchmark takes, 0 / 0 is 1, so that an output that is a reference scores best; the recall of keep divides by the sum of counts;
and texts are in lower case and in sacrebleu's words of 13a. The source is the last turn that was asked, with its instruction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache as once
from typing import Any

label = "SARI"
requires = "sacrebleu"
_LONGEST = 4
Grams = Counter[tuple[str, ...]]


def score(said: str, references: Sequence[str], prompt: str) -> float:
    """SARI of one text, in [0, 1]; all references count together."""
    source, output, *wanted = (_words(text) for text in (prompt, said, *references))
    parts = [_parts(*(_grams(text, n) for text in (source, output, *wanted))) for n in range(1, _LONGEST + 1)]
    return sum(map(sum, parts)) / (3 * _LONGEST)


def _parts(source: Grams, output: Grams, *references: Grams) -> tuple[float, float, float]:
    """Keep, delete and add of n-grams of one length."""
    count = len(references)
    wanted: Grams = sum(references, Counter())
    before = Counter({gram: count * times for gram, times in source.items()})
    after = Counter({gram: count * times for gram, times in output.items()})
    kept, dropped = before & after, before - after
    rightly_kept, rightly_dropped = kept & wanted, dropped - wanted
    keep = _f1(
        _ratio(sum(times / kept[gram] for gram, times in rightly_kept.items()), len(kept)),
        _ratio(rightly_kept.total(), (before & wanted).total()),
    )
    delete = _ratio(sum(times / dropped[gram] for gram, times in rightly_dropped.items()), len(dropped))
    new, due = set(output) - set(source), set(wanted) - set(source)
    add = _f1(_ratio(len(new & due), len(new)), _ratio(len(new & due), len(due)))
    return keep, delete, add


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _grams(words: list[str], n: int) -> Grams:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _words(text: str) -> list[str]:
    return str(_tokenizer()(text.lower())).split()


@once
def _tokenizer() -> Any:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()
