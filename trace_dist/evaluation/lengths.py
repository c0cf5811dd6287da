"""How many tokens scoring reads, worked out before anything is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from trace_dist.config import DataConfig, EvalConfig
from trace_dist.data.encoding import encode_pairs, encode_prompt
from trace_dist.data.examples import references_of
from trace_dist.data.tasks import Task
from trace_dist.evaluation.metric import load_metric

Rows = Sequence[Mapping[str, Any]]


def longest_answer(tokenizer: PreTrainedTokenizerBase, rows: Rows) -> int:
    """Tokens of the longest reference answer, with its end token."""
    asked = [(row["prompt"], answer) for row in rows for answer in references_of(row)]
    pairs = encode_pairs([prompt for prompt, _ in asked], [answer for _, answer in asked], tokenizer)
    return max(len(pair.answer) for pair in pairs)


def prompt_limit(tokenizer: PreTrainedTokenizerBase, rows: Rows, data: DataConfig | None) -> int | None:
    """Prompt tokens left when the longest reference answer (and the token after it) must fit as well."""
    if data is None or not data.truncate_prompt:
        return None
    return max(1, data.max_length - longest_answer(tokenizer, rows) - 1)


def longest_prompts(tokenizer: PreTrainedTokenizerBase, rows: Rows, data: DataConfig) -> tuple[int, int]:
    """Tokens of the longest prompt when it is answered, and when it is routed."""
    prompts = [row["prompt"] for row in rows]
    scored = encode_prompt(prompts, tokenizer, prompt_limit(tokenizer, rows, data))
    routed = encode_prompt(prompts, tokenizer, data.max_length if data.truncate_prompt else None)
    return max(map(len, scored)), max(map(len, routed))


def tokens_needed(tokenizer: PreTrainedTokenizerBase, task: Task, cfg: EvalConfig, data: DataConfig) -> int:
    """Longest sequence that a model reads when a task's test examples are scored, and when their prompts are routed.

    Raises:
        ValueError: a prompt has no tokens, the chat template cannot be rendered, or as ``load_metric``.
    """
    metric = load_metric(task)
    if metric.compare is None:
        return int(metric.module.tokens_needed(tokenizer, task, data))
    rows = task.test.to_list()
    scored, routed = longest_prompts(tokenizer, rows, data)
    num_new = cfg.max_new_tokens or longest_answer(tokenizer, rows) + 1
    # The last token is predicted, not read.
    return max(scored + num_new - 1, routed)
