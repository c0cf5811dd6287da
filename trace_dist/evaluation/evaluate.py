"""Score a model on a task by the task's own metric."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from trace_dist.config import DataConfig, EvalConfig
from trace_dist.data.encoding import encode_prompt
from trace_dist.data.tasks import Task
from trace_dist.evaluation.lengths import generation_caps, longest_answer, prompt_limits
from trace_dist.evaluation.match import score_encoded
from trace_dist.evaluation.metric import load_metric
from trace_dist.evaluation.score import Score


def evaluate_task(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    cfg: EvalConfig,
    data: DataConfig | None = None,
    *,
    answer_tokens: int | None = None,
) -> Score:
    """Score the task's test examples; every rank must call it, every rank gets the result.

    Args:
        model: causal LM, possibly sharded.
        tokenizer: the model's.
        task: examples and metric.
        cfg: batch size and generation cap.
        data: with ``truncate_prompt`` each prompt is cut by its own answers, as in training; None never cuts.
        answer_tokens: tokens of the longest reference (``longest_answer``), where ``task`` holds a part of its test examples;
            worked out when None.

    Raises:
        ValueError: an example does not fit the model's context or ``data.max_length``, or as the metric does.
    """
    metric = load_metric(task)
    if metric.compare is None:
        score: Score = metric.module.evaluate(model, tokenizer, task, cfg, data)
        return score
    rows = task.test.to_list()
    prompts = encode_prompt([row["prompt"] for row in rows], tokenizer, prompt_limits(tokenizer, rows, data))
    if answer_tokens is None:
        answer_tokens = longest_answer(tokenizer, rows)
    return score_encoded(
        model,
        tokenizer,
        rows,
        prompts,
        metric.compare,
        batch_size=cfg.batch_size,
        max_new_tokens=generation_caps(prompts, answer_tokens, cfg, data),
    )
