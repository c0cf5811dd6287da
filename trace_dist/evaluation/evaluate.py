"""Score a model on a task by the task's own metric."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from trace_dist.config import DataConfig, EvalConfig
from trace_dist.data.tasks import Task
from trace_dist.evaluation.choice import choice_accuracy
from trace_dist.evaluation.lengths import prompt_limit
from trace_dist.evaluation.match import exact_match
from trace_dist.evaluation.score import Score
from trace_dist.evaluation.text import answer_bits_per_byte


def evaluate_task(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    cfg: EvalConfig,
    data: DataConfig | None = None,
) -> Score:
    """Score the task's test examples; every rank must call it, every rank gets the result.

    Args:
        model: causal LM, possibly sharded.
        tokenizer: the model's.
        task: examples and metric.
        cfg: batch size and generation cap.
        data: with ``truncate_prompt`` prompts are cut as in training; None never cuts.

    Raises:
        ValueError: an example does not fit the model's context, or as the metric does.
    """
    rows = task.test.to_list()
    cut = prompt_limit(tokenizer, rows, data)
    if task.metric == "exact_match":
        return exact_match(
            model,
            tokenizer,
            rows,
            batch_size=cfg.batch_size,
            max_new_tokens=cfg.max_new_tokens,
            max_prompt_tokens=cut,
        )
    if task.metric == "choice":
        if task.choices is None:
            raise AssertionError(f"task {task.name}: metric choice without choices")
        return choice_accuracy(
            model, tokenizer, rows, task.choices, batch_size=cfg.batch_size, max_prompt_tokens=cut
        )
    return answer_bits_per_byte(model, tokenizer, rows, batch_size=cfg.batch_size, max_prompt_tokens=cut)
