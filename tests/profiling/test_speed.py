"""What a pass takes beside its products: operators, counted without memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from trace_dist.config import LaunchConfig, MaskConfig, TrainConfig
from trace_dist.masks.layouts import layouts_for
from trace_dist.profiling.passes import OPERATORS_PER_MODULE, num_operators
from trace_dist.profiling.selection import formed_elements, selections
from trace_dist.profiling.speed import (
    UTILISATION,
    Machine,
    dense_flops,
    masked_flops,
    matmul_rate,
    step_passes,
)
from trace_dist.stages.effort import Outlook
from trace_dist.stages.preview import _size


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


def test_recomputed_activations_are_one_more_forward_pass() -> None:
    assert step_passes(10, 8, 4, recomputes=True) == 90
    for recomputes, extra in ((False, 0), (True, 2)):
        assert dense_flops(5, 10, recomputes) == (6 + extra) * 50
        assert masked_flops(5, 10, 0.5, rows=True, recomputes=recomputes) == (5 + extra) * 50
        assert masked_flops(5, 10, 0.5, rows=False, recomputes=recomputes) == (6 + extra) * 50


@pytest.mark.parametrize(("ranks", "size", "passes"), [(4, 1, 40), (4, 2, 70), (4, 3, 40)])
def test_ranks_that_share_rows_have_the_same_examples(ranks: int, size: int, passes: float) -> None:
    train = TrainConfig(batch_size=8, micro_batch_size=2, sequence_parallel=size)
    cfg: Any = SimpleNamespace(train=train, launch=LaunchConfig(num_ranks=ranks, launcher="torchrun"))
    seen = Outlook(cfg, [], [], {}, {}, None, None)
    assert seen.step_passes(10, launched=True) == passes
    assert seen.gradient_passes(10, True, 8) == 40


@pytest.mark.parametrize(
    "granularity",
    ["element", "block", "row", "column", "head", "neuron", "tensor", "row,q=head", "row,q=element"],
)
def test_gradients_of_whole_lines_are_counted_by_the_mask(granularity: str) -> None:
    mask = MaskConfig(granularity=granularity, block=4)
    layouts = layouts_for(llama(2), mask.granularity, mask.block, mask.maskable)
    chosen = selections(layouts, 0.3)
    formed = sum(formed_elements(layouts[name], each) for name, each in chosen.items())
    assert (formed == sum(each.entries for each in chosen.values())) == mask.in_lines


def test_a_token_is_multiplied_by_the_experts_that_it_is_sent_to() -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 24}
    module = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts, num_key_value_heads=2, head_dim=8))
    numel = {name: parameter.numel() for name, parameter in module.named_parameters()}
    of_experts = sum(count for name, count in numel.items() if ".experts." in name)
    assert of_experts == 2 * 4 * 3 * 16 * 24
    expected = sum(numel.values()) - 32 * 16 - of_experts * 3 // 4
    assert _size(SimpleNamespace(module=module, numel=numel)) == expected  # type: ignore[arg-type]


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
