"""Metric choice: the likeliest of all answers of the task is right (evaluation/choice.py)."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from trace_dist.config import DataConfig, EvalConfig
from trace_dist.data.tasks import Task
from trace_dist.evaluation.choice import choice_accuracy
from trace_dist.evaluation.lengths import encoded_prompts, longest_answers, prompt_limits
from trace_dist.evaluation.score import Score

label = "likeliest answer"


def evaluate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    cfg: EvalConfig,
    data: DataConfig | None,
) -> Score:
    """As ``choice_accuracy`` of the task's test examples."""
    rows = task.test.to_list()
    choices = _choices(task)
    limits = prompt_limits(tokenizer, rows, data, choices)
    return choice_accuracy(
        model, tokenizer, rows, choices, batch_size=cfg.batch_size, max_prompt_tokens=limits
    )


def tokens_needed(tokenizer: PreTrainedTokenizerBase, task: Task, data: DataConfig) -> int:
    """Longest sequence that a model reads."""
    rows = task.test.to_list()
    choices = _choices(task)
    scored, routed = encoded_prompts(tokenizer, rows, data, prompt_limits(tokenizer, rows, data, choices))
    (longest,) = longest_answers(tokenizer, rows[:1], choices)
    return max(max(map(len, scored)) + longest - 1, routed)


def _choices(task: Task) -> list[str]:
    if task.choices is None:
        raise AssertionError(f"task {task.name}: metric choice without choices")
    return task.choices
