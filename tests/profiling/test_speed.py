"""What a pass takes beside its products: operators, counted without memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from trace_dist.profiling.passes import OPERATORS_PER_MODULE, num_operators
from trace_dist.profiling.speed import UTILISATION, Machine, matmul_rate, step_passes


def llama(layers: int) -> LlamaForCausalLM:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers))


class Launched(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def test_operators_are_those_of_a_real_pass() -> None:
    for layers in (1, 4):
        model, launched = llama(layers), Launched()
        with torch.no_grad(), launched:
            model(input_ids=torch.zeros(1, 16, dtype=torch.int64))
        assert launched.number / 2 < num_operators(model.to("meta")) < 2 * launched.number


def test_a_model_that_takes_no_tokens_has_a_rough_count() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).to("meta")
    assert num_operators(model) == 2 * OPERATORS_PER_MODULE


def test_time_is_products_and_operators() -> None:
    machine = Machine(matmul=1e9, launch=1e-5)
    products, operators = 2e7 / (UTILISATION * 1e9), 3 * 100 * 1e-5
    assert machine.seconds(2e7, 3, 100) == pytest.approx(products + operators)
    assert machine.seconds(2e7, 3, 100, sharers=2) == pytest.approx(products / 2 + operators)


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "passes"),
    [(8, 8, 1, 40), (8, 4, 1, 70), (8, 8, 2, 40), (9, 4, 2, 70), (1, 4, 2, 40)],
)
def test_passes_of_steps(batch: int, micro: int, ranks: int, passes: float) -> None:
    """Three for each micro-batch, and one for the update."""
    assert step_passes(10, batch, micro, ranks) == passes


def test_the_rate_is_that_of_all_three_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, and the gradients of inputs and weights; each counted where it is computed."""
    counter = FlopCounterMode(display=False)

    def seconds_of(work: Any, *_: Any) -> float:
        with counter:
            work()
        return 2.0

    monkeypatch.setattr("trace_dist.profiling.speed._seconds_of", seconds_of)
    rate = matmul_rate(torch.float32, torch.device("cpu"), 24, 7)
    assert rate == counter.get_total_flops() / 2 == 3 * 2 * 7 * 24 * 24 / 2
    monkeypatch.setattr("trace_dist.profiling.speed.LARGEST", 20)
    assert matmul_rate(torch.float32, torch.device("cpu"), 10**6, 10**6) == 3 * 2 * 20**3 / 2
