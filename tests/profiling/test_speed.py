"""What a pass takes beside its products: operators and bytes, counted without memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from trace_dist.profiling.passes import OPERATORS_PER_MODULE, PassCost, forward_cost
from trace_dist.profiling.speed import UTILISATION, Machine, step_passes


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
        cost = forward_cost(model.to("meta"))
        assert launched.number / 2 < cost.operators < 2 * launched.number
        # The logits alone have 32 numbers per token, and every layer has 11 results as wide as the model or wider.
        assert cost.bytes_per_token > 4 * (32 + layers * 11 * 16)


def test_a_model_that_takes_no_tokens_has_a_rough_count() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).to("meta")
    assert forward_cost(model) == PassCost(2 * OPERATORS_PER_MODULE, 0.0)


def test_time_is_products_bytes_and_operators() -> None:
    machine, cost = Machine(matmul=1e9, launch=1e-5, written=1e8), PassCost(100, 1e4)
    # 10 tokens through a million parameters
    found = machine.seconds(2e7, 3, 10**6, cost)
    assert found == pytest.approx(2e7 / (UTILISATION * 1e9) + 10 * 1e4 / 1e8 + 3 * 100 * 1e-5)
    shared = machine.seconds(2e7, 3, 10**6, cost, sharers=2)
    assert found - shared == pytest.approx((found - 3e-3) / 2)


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "passes"),
    [(8, 8, 1, 40), (8, 4, 1, 70), (8, 8, 2, 40), (9, 4, 2, 70), (1, 4, 2, 40)],
)
def test_passes_of_steps(batch: int, micro: int, ranks: int, passes: float) -> None:
    """Three for each micro-batch, and one for the update."""
    assert step_passes(10, batch, micro, ranks) == passes
