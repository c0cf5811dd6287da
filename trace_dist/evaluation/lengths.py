"""How many tokens scoring reads, worked out before anything is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from trace_dist.config import DataConfig, EvalConfig
from trace_dist.data.encoding import encode_pairs, encode_prompt
from trace_dist.data.tasks import Task


def longest_answer(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, str]]) -> int:
    """Tokens of the longest reference answer, with its end token."""
    pairs = encode_pairs([row["prompt"] for row in rows], [row["answer"] for row in rows], tokenizer)
    return max(len(pair.answer) for pair in pairs)


def prompt_limit(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, str]], data: DataConfig | None
) -> int | None:
    """Prompt tokens left when the longest reference answer (and the token after it) must fit as well."""
    if data is None or not data.truncate_prompt:
        return None
    return max(1, data.max_length - longest_answer(tokenizer, rows) - 1)


def tokens_needed(tokenizer: PreTrainedTokenizerBase, task: Task, cfg: EvalConfig, data: DataConfig) -> int:
    """Longest sequence that a model reads when a task's test examples are scored, and when their prompts are routed.

    Raises:
        ValueError: a prompt has no tokens, or the chat template cannot be rendered.
    """
    rows = task.test.to_list()
    prompts, answers = [row["prompt"] for row in rows], [row["answer"] for row in rows]
    cut = encode_prompt(prompts, tokenizer, prompt_limit(tokenizer, rows, data))
    # The last token is predicted, not read; of a text that is counted in bytes, the end token is not predicted.
    if task.metric == "bits_per_byte":
        pairs = encode_pairs(prompts, answers, tokenizer)
        return max(len(ids) + len(pair.answer) - 2 for ids, pair in zip(cut, pairs, strict=True))
    routed = encode_prompt(prompts, tokenizer, data.max_length if data.truncate_prompt else None)
    if task.choices is not None:
        labels = [{"prompt": prompts[0], "answer": choice} for choice in task.choices]
        num_new = longest_answer(tokenizer, labels)
    else:
        num_new = cfg.max_new_tokens or longest_answer(tokenizer, rows) + 1
    return max(max(map(len, cut)) + num_new - 1, *map(len, routed))
