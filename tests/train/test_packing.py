"""Packed rows: the same loss and gradients as without them, for models that keep examples apart; the others are found out."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import datasets
import pytest
import torch
from engine.cases import FAMILIES
from engine.resuming import CONFIG, PLAIN, STEPS, make_batches
from train.rows import taught
from transformers import AutoConfig, AutoModelForCausalLM

from trace_dist import shard
from trace_dist.data.batches import Batches
from trace_dist.data.packing import Layout
from trace_dist.train.learner import DenseLearner
from trace_dist.train.loop import train_steps
from trace_dist.train.loss import accumulate
from trace_dist.train.packing import mixes, settle_packing
from trace_dist.train.soft import SoftBatches, forward_soft_nll_sum
from trace_dist.train.task import train_mask

LENGTHS = (3, 11, 5, 2, 7, 4, 9, 13, 2, 6)
STATEFUL: dict[str, dict[str, Any]] = {
    "mamba": {"vocab_size": 101, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 4},
    "bloom": {"vocab_size": 101, "hidden_size": 24, "n_layer": 2, "n_head": 3},
}


def rows(k: int = 3) -> datasets.Dataset:
    """Examples of odd lengths with one to three answer tokens each, and what a teacher says of these."""
    generator = torch.Generator().manual_seed(3)
    return datasets.Dataset.from_list(
        [taught(generator, length, min(length - 1, 1 + length % 3), 101, k) for length in LENGTHS]
    )


def batches(layout: Layout | None, kind: type[Batches] = Batches, micro: int = 2, **options: Any) -> Batches:
    made = kind(
        rows(), batch_size=len(LENGTHS), micro_batch_size=micro, seed=5, pad_id=0, packing=True, **options
    )
    made.pack(layout)
    return made


def family(name: str, attention: str = "eager", dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(1)
    options = {**FAMILIES, **STATEFUL}[name]
    window = {"sliding_window": 3} if name == "gemma3_text" else {}
    config = AutoConfig.for_model(name, **options, **window)
    known = {} if name in STATEFUL else {"attn_implementation": attention}
    return AutoModelForCausalLM.from_config(config, dtype=dtype, **known)


def gradients(model: Any, batch: Batches, nll_sum: Any = None) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    options = {} if nll_sum is None else {"nll_sum": nll_sum}
    loss = accumulate(next(batch), model, lambda loss: loss.backward(), torch.device("cpu"), **options)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return float(loss), found


@pytest.mark.parametrize("layout", ["rows", "flat"])
@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("llama", "eager"),
        ("llama", "sdpa"),
        ("gpt2", "eager"),
        ("gemma3_text", "sdpa"),
    ],
)
def test_loss_and_gradients_are_those_without_packing(name: str, attention: str, layout: Layout) -> None:
    """In float64 (but for norms and a softmax, which the models take in float32), over a sliding window of 3 tokens in Gemma."""
    model = family(name, attention).train()
    loss, plain = gradients(model, batches(None))
    packed_loss, packed = gradients(model, batches(layout))
    assert packed_loss == pytest.approx(loss, rel=1e-9)
    assert plain.keys() == packed.keys()
    for key, value in plain.items():
        torch.testing.assert_close(packed[key], value, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("layout", ["rows", "flat"])
def test_what_a_teacher_says_stays_with_its_tokens(layout: Layout) -> None:
    model = family("llama").train()
    loss, plain = gradients(model, batches(None, SoftBatches), forward_soft_nll_sum)
    packed_loss, packed = gradients(model, batches(layout, SoftBatches), forward_soft_nll_sum)
    assert packed_loss == pytest.approx(loss, rel=1e-6)
    for key, value in plain.items():
        torch.testing.assert_close(packed[key], value, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama", None),
        ("gpt2", None),
        ("gemma3_text", None),
        ("qwen2_moe", None),
        ("opt", "lets the examples of a row see each other"),  # its mask is made without the position ids
        ("gpt_neox", None),
        ("mamba", "takes no position_ids"),
        ("bloom", "takes no position_ids"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_who_keeps_examples_apart(name: str, reason: str | None, dtype: torch.dtype) -> None:
    if name == "qwen2_moe" and dtype == torch.bfloat16:
        pytest.skip("sizes that nothing divides do not run as grouped products in bf16, packed or not")
    model = family(name, dtype=dtype)
    learner = DenseLearner(model, model.parameters(), CONFIG)
    found = mixes(learner, batches(None).fullest_row(), "rows")
    assert (found is None) if reason is None else (found is not None and reason in found)


class Mixing(torch.nn.Module):
    """A layer that adds to each token a little of the one before it, as a short convolution does."""

    def __init__(self, inner: torch.nn.Module, share: float) -> None:
        super().__init__()
        self.inner, self.share = inner, share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x + self.share * torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_lets_examples_see_each_other_is_found_out(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes position ids, but its last layer reads the token before: packing is off, said, and the training goes on."""
    model = family("llama", dtype=dtype)
    model.model.layers[-1].mlp = Mixing(model.model.layers[-1].mlp, 1.0)
    learner = DenseLearner(model, model.parameters(), CONFIG)
    made = Batches(rows(), batch_size=10, micro_batch_size=2, seed=5, pad_id=0, packing=True)
    settle_packing(learner, made)
    assert "data.packing: is off, LlamaForCausalLM" in caplog.text
    assert not made.wants_packing
    assert "attention_mask" in next(made).micro_batches[0]


def test_positions_that_do_not_begin_anew_are_found_out() -> None:
    """Absolute positions of the row instead of the example's: nobody sees another, but the answers are others."""
    model = family("gpt2", dtype=torch.float32)
    table = model.transformer.wpe.forward
    model.transformer.wpe.forward = lambda ids: table(torch.arange(ids.shape[1])[None])
    learner = DenseLearner(model, model.parameters(), CONFIG)
    found = mixes(learner, batches(None).fullest_row(), "rows")
    assert found is not None
    assert "gives other answers in a packed row" in found


def test_lora_keeps_examples_apart() -> None:
    """PEFT's wrapper passes on what it is given: the cache, with which rows would not be seen as packed, is switched off."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(family("llama", dtype=torch.float32), LoraConfig(r=2, target_modules="all-linear"))
    learner = DenseLearner(model, [p for p in model.parameters() if p.requires_grad], CONFIG)
    assert mixes(learner, batches(None).fullest_row(), "rows") is None


def test_a_masked_training_has_the_losses_of_one_without_packing() -> None:
    """Through the checkpointed path of a run: the curve is the same up to rounding."""
    found = {}
    for packing in (False, True):
        model = shard(PLAIN.model(), "single")
        made = make_batches()
        made.wants_packing = packing
        result, _ = train_mask(model, PLAIN.mask(model), made, CONFIG, STEPS, description="t")
        found[packing] = [loss for _, loss in result.losses]
        assert (made._layout is not None) == packing
    assert found[True] == pytest.approx(found[False], rel=1e-5)


def test_nothing_is_packed_where_examples_are_of_one_length(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("trace_dist").setLevel(logging.INFO)
    model = family("llama", dtype=torch.float32)
    learner = DenseLearner(model, model.parameters(), CONFIG)
    same = datasets.Dataset.from_list(
        [{**row, "labels": [-100, 7]} | {"input_ids": [5, 7]} for row in rows()]
    )
    made = Batches(same, batch_size=4, micro_batch_size=2, seed=0, pad_id=0, packing=True)
    train_steps(learner, made, replace(CONFIG, warmup_steps=0), 1)
    assert "no two examples of a batch fit into a row" in caplog.text
