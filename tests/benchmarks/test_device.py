"""The benchmarks on a GPU that is not there (engine/fake_gpu.py): one device for all, and a clock that waits for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine.cases import CASES
from engine.fake_gpu import OnGpu, fake_gpu
from torch import Tensor

from trace_dist.benchmarks import agreement, optimizer, representations, step
from trace_dist.benchmarks.contestants import Contestant, Race
from trace_dist.benchmarks.timing import now
from trace_dist.config import BankConfig, DataConfig, EvalConfig, ModelConfig, TaskConfig


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    return log


def test_the_batch_is_where_the_model_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    race = Race("tiny")
    expected = race.batch()
    with fake_gpu(monkeypatch):
        found = race.batch()
        assert all(isinstance(tensor, OnGpu) for tensor in found.values())
        assert all(torch.equal(found[name].cpu(), expected[name]) for name in expected)


def test_the_clock_waits_for_the_device(monkeypatch: pytest.MonkeyPatch, waits: list[str]) -> None:
    now()
    assert waits == []
    with fake_gpu(monkeypatch):
        now()
    assert waits == ["wait"]


def test_every_phase_of_a_step_is_waited_for(monkeypatch: pytest.MonkeyPatch, waits: list[str]) -> None:
    contestant = Contestant(
        forward=lambda: waits.append("forward") or torch.zeros(()),  # type: ignore[func-returns-value]
        backward=lambda loss: waits.append("backward"),
        step=lambda: waits.append("step"),
        num_trained=1,
        states=dict,
    )
    with fake_gpu(monkeypatch):
        monkeypatch.setattr("trace_dist.utils.dist.max_over_ranks", lambda value: value)
        step.measure(contestant, steps=1)
    timed = ["wait", "forward", "wait", "backward", "wait", "step", "wait"]
    assert waits[: 3 * len(timed)] == 3 * timed


def test_optimizers_race_on_one_device(monkeypatch: pytest.MonkeyPatch, waits: list[str]) -> None:
    """Without the peer that knows the CPU alone."""
    monkeypatch.setattr(optimizer, "WIDTH", 32)
    monkeypatch.setattr(optimizer, "NUM_LAYERS", 2)
    raced: list[Tensor] = []
    make = torch.optim.AdamW

    def unfused(parameters: list[Tensor], lr: float, fused: bool) -> torch.optim.Optimizer:
        raced.extend(parameters)
        return make(parameters, lr=lr, foreach=False)

    monkeypatch.setattr(torch.optim, "AdamW", unfused)
    with fake_gpu(monkeypatch):
        rows = optimizer.race_optimizers(density=0.1, rounds=1)["rows"]
    assert [row["name"] for row in rows] == 2 * [*optimizer.MASKS, "torch fused AdamW"]
    assert raced
    assert all(isinstance(tensor, OnGpu) for tensor in raced)
    assert waits


def test_prompts_are_represented_on_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(representations, "load_model", lambda *_: CASES["element"].model())
    monkeypatch.setattr(representations, "load_tokenizer", lambda _: None)
    plan = representations.RetrievalSettings(
        tmp_path,
        ModelConfig(str(tmp_path)),
        DataConfig(),
        BankConfig(layer=1),
        EvalConfig(),
        (TaskConfig("one", path="one.jsonl"), TaskConfig("two", path="two.jsonl")),
        seed=0,
        layers=(1,),
    )
    with fake_gpu(monkeypatch):
        model, _ = representations.Reader(plan).loaded
    assert all(isinstance(parameter, OnGpu) for parameter in model.parameters())


def test_a_comparison_with_cpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ranks would share the GPU, and be compared with what a CPU takes for each operator."""
    with fake_gpu(monkeypatch), pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES="):
        agreement.compare(Race("tiny"), steps=1, rounds=1)
