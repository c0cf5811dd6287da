"""Dense methods on a GPU that is not there (engine/fake_gpu.py)."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine.cases import CASES
from engine.fake_gpu import OnGpu, fake_gpu
from torch import Tensor

from trace_dist.continual.methods import dense
from trace_dist.continual.methods.full import Full
from trace_dist.continual.methods.lora_retrieved import LoRARetrieved


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as found:
        yield found


def test_a_trial_holds_one_copy_of_the_weights_on_the_device(
    monkeypatch: pytest.MonkeyPatch, stack: ExitStack
) -> None:
    """What it puts back waits in host memory, and is put back bit for bit."""
    part: Any = SimpleNamespace(steps=1)
    setting: Any = SimpleNamespace(base="base")
    held = []

    class Trained(Full):
        def learner(self, lr: float) -> Any:
            return None

        def steps(self, stream: Any) -> int:
            return 1

        def _train(self, *_: Any, **__: Any) -> Any:
            gc.collect()
            held.append(sum(each.numel() for each in gc.get_objects() if type(each) is OnGpu))
            for parameter in self.trained().values():
                parameter.add_(1)

    monkeypatch.setattr(dense, "load_model", lambda *_: CASES["element"].model().requires_grad_(True))
    monkeypatch.setattr(dense, "random_numbers_kept", nullcontext)
    stack.enter_context(fake_gpu(monkeypatch))
    method = Trained("full", setting, None)
    before = {name: value.cpu() for name, value in method.trained().items()}
    own = sum(each.numel() for each in (*method.module.parameters(), *method.module.buffers()))
    with method.trial(part, part, 1.0):
        assert all(isinstance(each, OnGpu) for each in method.trained().values())
        assert not any(torch.equal(each.cpu(), before[name]) for name, each in method.trained().items())
    assert all(torch.equal(each.cpu(), before[name]) for name, each in method.trained().items())
    assert held == [own]


def test_adapters_of_earlier_tasks_wait_in_host_memory(
    monkeypatch: pytest.MonkeyPatch, stack: ExitStack
) -> None:
    class Learned(LoRARetrieved):
        def __init__(self) -> None:
            self.bank: Any = SimpleNamespace(values={}, retriever=SimpleNamespace(add=lambda _: None))
            self.weights = {"a": torch.ones(3).to("cuda"), "b": torch.zeros(2).to("cuda")}

        def trained(self) -> Any:
            return self.weights

        def renew(self) -> None:
            self.put({name: torch.zeros_like(each) for name, each in self.weights.items()})

        def _signature(self, *_: Any) -> Any:
            return None

    monkeypatch.setattr(dense.Dense, "learn", lambda *_: None)
    stack.enter_context(fake_gpu(monkeypatch))
    method = Learned()
    method.learn(SimpleNamespace(task=SimpleNamespace(name="one")))  # type: ignore[arg-type]
    kept: dict[str, Tensor] = method.bank.values["one"]
    assert {name: (type(each), each.tolist()) for name, each in kept.items()} == {
        "a": (Tensor, [1.0] * 3),
        "b": (Tensor, [0.0] * 2),
    }
    assert not method.weights["a"].any()
    method.put(kept)
    assert isinstance(method.weights["a"], OnGpu)
    assert bool(method.weights["a"].all())
