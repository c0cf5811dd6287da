"""Prompts of a run's training examples, as a bank keeps them and as its teachers are asked them. No answer is among them."""

from __future__ import annotations

from collections.abc import Sequence

from trace_dist.bank.prompts import Prompts, PromptSets
from trace_dist.continual.setting import Setting
from trace_dist.data.encoding import Pair
from trace_dist.train.workbench import Stream


def to_keep(setting: Setting, streams: Sequence[Stream]) -> PromptSets | None:
    """What the bank keeps of a task, or of the general sets; None where it shall keep nothing."""
    count = setting.cfg.bank.keep_prompts
    return {stream.task.name: prompts_of(setting, stream, count) for stream in streams} if count else None


def prompts_of(setting: Setting, stream: Stream, count: int | None) -> Prompts:
    """The prompts of a task's first training examples, of all where ``count`` is None; running text as it is.

    Answers may be one token longer than the longest that was trained, unless ``eval.max_new_tokens`` says more.
    """
    rows = stream.encoded.select(range(min(count or len(stream.encoded), len(stream.encoded))))
    pairs = split_pairs(rows["input_ids"][:], rows["num_answer_tokens"][:])
    if stream.task.metric == "bits_per_byte":
        return Prompts(pairs, None)
    cap = setting.cfg.eval.max_new_tokens or 1 + max(len(pair.answer) for pair in pairs)
    return Prompts([Pair(pair.prompt, []) for pair in pairs], cap)


def split_pairs(ids: Sequence[list[int]], num_answer_tokens: Sequence[int]) -> list[Pair]:
    """Token ids of examples, taken apart."""
    starts = (len(row) - count for row, count in zip(ids, num_answer_tokens, strict=True))
    return [Pair(row[:start], row[start:]) for row, start in zip(ids, starts, strict=True)]
