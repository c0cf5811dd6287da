"""Prompts of a run's training examples, as a bank keeps them and as its teachers are asked them. No answer is among them."""

from __future__ import annotations

from collections.abc import Sequence

import datasets

from trace_dist.bank.prompts import Prompts, PromptSets
from trace_dist.continual.setting import Setting
from trace_dist.data.encoding import Pair, last_pair
from trace_dist.train.workbench import Stream


def to_keep(setting: Setting, streams: Sequence[Stream]) -> PromptSets | None:
    """What the bank keeps of a task, or of the general sets; None where it shall keep nothing."""
    count = setting.cfg.bank.keep_prompts if setting.bench.modality.keeps_prompts else 0
    return {stream.task.name: prompts_of(setting, stream, count) for stream in streams} if count else None


def prompts_of(setting: Setting, stream: Stream, count: int | None) -> Prompts:
    """The prompts of a task's first training examples, of all where ``count`` is None; running text as it is.

    Answers may be one token longer than the longest that was trained, unless ``eval.max_new_tokens`` says more.
    """
    rows = stream.encoded.select(range(min(count or len(stream.encoded), len(stream.encoded))))
    pairs = pairs_in(rows)
    if stream.task.metric == "bits_per_byte":
        return Prompts(pairs, None)
    cap = setting.cfg.eval.max_new_tokens or 1 + max(len(pair.answer) for pair in pairs)
    return Prompts([Pair(pair.prompt, []) for pair in pairs], cap)


def pairs_in(encoded: datasets.Dataset) -> list[Pair]:
    """Encoded examples, taken apart before their last answers."""
    columns = encoded["input_ids"][:], encoded["labels"][:]
    return [last_pair(ids, labels) for ids, labels in zip(*columns, strict=True)]
