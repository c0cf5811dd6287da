"""Batches that a model on a GPU reads, which is not there (engine/fake_gpu.py): they are taken to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine.cases import CASES
from engine.fake_gpu import OnGpu, fake_gpu, place
from torch import Tensor

from trace_dist.config import TrainConfig
from trace_dist.data.batches import Step, collate
from trace_dist.data.encoding import Pair
from trace_dist.train.learner import DenseLearner
from trace_dist.train.packing import layout_of, mixes
from trace_dist.train.teacher import teach

ROWS = [
    {"input_ids": [1, 5, 3, 4, 9, 8], "labels": [-100, 5, 3, 4, 9, 8]},
    {"input_ids": [1, 2, 7], "labels": [-100, 2, 7]},
]
PAIRS = [Pair([1, 5, 6], [7]), Pair([1], [2, 3, 4, 9])]


def make(device: str) -> DenseLearner:
    module = place(CASES["element"].model(), device)
    module.set_attn_implementation("eager")
    learner = DenseLearner(module, module.parameters(), TrainConfig(), 1e-3)
    # There is no backward pass on a GPU that is not there.
    learner.backward = lambda loss: None  # type: ignore[method-assign]
    return learner


def losses(device: str) -> Tensor:
    learner = make(device)
    assert mixes(learner, ROWS, layout_of(learner)) is None
    return learner.accumulate(Step([collate(ROWS, 0)] * 2, 14))


def test_training_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step, and those that show whether examples may share a row."""
    expected = losses("cpu")
    with fake_gpu(monkeypatch):
        found = losses("cuda")
        assert isinstance(found, OnGpu)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=0)


def test_what_a_teacher_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(device: str) -> list[Any]:
        taught = teach(make(device).module, PAIRS, top=3, batch_size=2, pad_id=0)
        return [row for name in sorted(taught.column_names) for row in taught[name]]

    expected = said("cpu")
    with fake_gpu(monkeypatch):
        found = said("cuda")
    for mine, other in zip(found, expected, strict=True):
        assert torch.allclose(torch.tensor(mine), torch.tensor(other), rtol=1e-4)
