"""What is held out of a signature was seen by no fit, though the data hold each prompt several times."""

from __future__ import annotations

import logging
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trace_dist.bank.rejection import Rejection
from trace_dist.config import BankConfig
from trace_dist.continual.judge import Judge
from trace_dist.continual.sample import seen_once
from trace_dist.data.examples import as_dataset
from trace_dist.data.tasks import Task

DIM, RATE = 64, 0.1


def task(prompts: list[str]) -> Task:
    rows = as_dataset([{"prompt": prompt, "answer": str(number)} for number, prompt in enumerate(prompts)])
    return Task("t", rows, rows, None, "exact_match", 0.0, 0.0)


def represent(prompts: list[str]) -> torch.Tensor:
    """Each prompt has a place of its own."""
    drawn = [
        random.Random(prompt).gauss(0, 1)
        for prompt in prompts
        for prompt in [f"{prompt} {i}" for i in range(DIM)]
    ]
    return torch.tensor(drawn).view(len(prompts), DIM)


def test_a_task_with_several_answers_to_each_prompt_rejects_no_more_of_its_own() -> None:
    """A prompt with four answers is four rows. New prompts were rejected nearly always."""
    prompts = [f"q{number}" for number in range(200)] * 4
    random.Random(0).shuffle(prompts)
    modality = SimpleNamespace(
        represent=lambda module, asked, *_, layers, poolings, **__: {
            pooling: represent(asked)[:, None] for pooling in poolings
        }
    )
    bench: Any = SimpleNamespace(modality=modality, tokenizer=None)
    cfg: Any = SimpleNamespace(data=None, eval=SimpleNamespace(batch_size=8), bank=BankConfig(), seed=0)
    model: Any = SimpleNamespace(eval=lambda: None, module=None)
    stream: Any = SimpleNamespace(task=task(prompts))
    signature = Judge(cfg, bench).signature(model, [stream], "t", -1)
    assert len(signature.heldout) == 50
    assert int(signature.counts.sum()) == 150
    new = represent([f"new{number}" for number in range(1000)])
    assert Rejection(signature, RATE).rejects(new).float().mean() < 2 * RATE


def test_hardly_any_different_prompts_are_said(caplog: pytest.LogCaptureFixture) -> None:
    assert seen_once(task(["a", "b", "a", "c"] * 10), 2) == ["a", "b"]
    assert seen_once(task([f"{number % 9}" for number in range(40)]), 30) == list("012345678")
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert seen_once(task(["a", "b", "a"] * 10), 9) == ["a", "b", "a"] * 3
    assert "tasks.t: has 2 different prompts" in caplog.text
