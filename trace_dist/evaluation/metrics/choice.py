"""Metric choice: the likeliest of all answers of the task is right (evaluation/choice.py)."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from trace_dist.config import DataConfig, EvalConfig
from trace_dist.data.tasks import Task
from trace_dist.evaluation.choice import choice_accuracy
from trace_dist.evaluation.lengths import longest_answer, longest_prompts, prompt_limit
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
    cut = prompt_limit(tokenizer, rows, data)
    return choice_accuracy(
        model, tokenizer, rows, _choices(task), batch_size=cfg.batch_size, max_prompt_tokens=cut
    )


def tokens_needed(tokenizer: PreTrainedTokenizerBase, task: Task, data: DataConfig) -> int:
    """Longest sequence that a model reads."""
    rows = task.test.to_list()
    scored, routed = longest_prompts(tokenizer, rows, data)
    labels = [{"prompt": rows[0]["prompt"], "answer": choice} for choice in _choices(task)]
    return max(scored + longest_answer(tokenizer, labels) - 1, routed)


def _choices(task: Task) -> list[str]:
    if task.choices is None:
        raise AssertionError(f"task {task.name}: metric choice without choices")
    return task.choices
