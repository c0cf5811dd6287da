"""Scores of a part of a test set."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from trace_dist.config import DataConfig, EvalConfig, TinyConfig
from trace_dist.continual.judge import Judge
from trace_dist.data.examples import as_dataset
from trace_dist.data.tasks import Task
from trace_dist.models.tiny import build_tiny
from trace_dist.models.tokenizer import char_tokenizer

PAIRS = [("abcde" * 8, "ab"), ("edcba" * 8, "c"), ("acbd", "abcdefgh")]


def length(said: str, references: list[str], prompt: str) -> float:
    """A metric that sees how much was generated."""
    return len(said) / 100


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return char_tokenizer({"t": [prompt for prompt, _ in PAIRS]}, [answer for _, answer in PAIRS])


@pytest.mark.parametrize("data", [DataConfig(), DataConfig(max_length=24, truncate_prompt=True)])
def test_a_score_does_not_depend_on_what_is_routed_along(
    tokenizer: PreTrainedTokenizerFast, data: DataConfig
) -> None:
    rows = as_dataset([{"prompt": prompt, "answer": answer} for prompt, answer in PAIRS])
    task = Task("t", rows, rows, None, "continual.test_judge.length", 0.0, 0.0)
    model = build_tiny(TinyConfig(32, 2, 2, 48), len(tokenizer), seed=0)
    with torch.no_grad():
        model.get_input_embeddings().weight[:5] = 0  # it writes no special tokens, which would end its answer
    judge = Judge(*_run(tokenizer, task, data))
    whole = judge.evaluate(model, task)
    assert max(whole.per_example[:2]) > 0.03
    for indices in ([0], [1], [1, 0]):
        some = judge._score_some(model, task, indices, "t")
        assert some.per_example == [whole.per_example[i] for i in indices]


def _run(tokenizer: PreTrainedTokenizerFast, task: Task, data: DataConfig) -> tuple[Any, Any]:
    """As much of a run as a judge of one task looks at."""
    bench = SimpleNamespace(tokenizer=tokenizer, tasks=[SimpleNamespace(task=task)], general=[])
    return SimpleNamespace(eval=EvalConfig(), data=data), bench
