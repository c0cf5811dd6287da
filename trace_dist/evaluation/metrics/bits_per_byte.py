"""Metric bits_per_byte: of the answer, for general sets; lower is better (evaluation/text.py)."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from trace_dist.config import DataConfig, EvalConfig
from trace_dist.data.encoding import encode_pairs
from trace_dist.data.tasks import Task
from trace_dist.evaluation.lengths import encoded_prompts, prompt_limits
from trace_dist.evaluation.score import Score
from trace_dist.evaluation.text import answer_bits_per_byte

label = "bits per byte"


def evaluate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    cfg: EvalConfig,
    data: DataConfig | None,
) -> Score:
    """As ``answer_bits_per_byte`` of the task's test examples."""
    rows = task.test.to_list()
    limits = prompt_limits(tokenizer, rows, data)
    return answer_bits_per_byte(model, tokenizer, rows, batch_size=cfg.batch_size, max_prompt_tokens=limits)


def tokens_needed(tokenizer: PreTrainedTokenizerBase, task: Task, data: DataConfig) -> int:
    """Longest sequence that a model reads: the last token and the end token are not read."""
    rows = task.test.to_list()
    scored, _ = encoded_prompts(tokenizer, rows, data, prompt_limits(tokenizer, rows, data))
    pairs = encode_pairs([row["prompt"] for row in rows], [row["answer"] for row in rows], tokenizer)
    return max(len(ids) + len(pair.answer) - 2 for ids, pair in zip(scored, pairs, strict=True))
