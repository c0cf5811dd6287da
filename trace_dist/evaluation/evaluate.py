"""Score a model on a task by the task's own metric."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from trace_dist.config import DataConfig, EvalConfig
from trace_dist.data.tasks import Task
from trace_dist.evaluation.lengths import prompt_limit
from trace_dist.evaluation.match import score_generated
from trace_dist.evaluation.metric import load_metric
from trace_dist.evaluation.score import Score


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
    metric = load_metric(task)
    if metric.compare is None:
        score: Score = metric.module.evaluate(model, tokenizer, task, cfg, data)
        return score
    rows = task.test.to_list()
    return score_generated(
        model,
        tokenizer,
        rows,
        metric.compare,
        batch_size=cfg.batch_size,
        max_new_tokens=cfg.max_new_tokens,
        max_prompt_tokens=prompt_limit(tokenizer, rows, data),
    )
