"""Activation checkpoints that transformers enables the reentrant way: each masked layer is trained as without them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine.cases import CASES, batches
from torch import Tensor, nn
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from trace_dist import Mask, MaskedAdamW

IDS = batches(CASES["element"])[0][0]
PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Wrapper(nn.Module):
    """A module of the user's own around a model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Tensor) -> Any:
        return self.inner(**inputs)


def of_images() -> PreTrainedModel:
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
    )
    torch.manual_seed(0)
    return ViTForImageClassification(config)


def loss_of(model: nn.Module, inner: PreTrainedModel) -> Tensor:
    inputs = {"input_ids": IDS} if inner.main_input_name == "input_ids" else {"pixel_values": PIXELS}
    return model(**inputs).logits.square().mean()


@pytest.mark.parametrize("options", [{"use_reentrant": True}, {}], ids=["asked for", "torch's default"])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("make", [CASES["element"].model, of_images], ids=["tokens", "pixels"])
def test_gradients_are_those_without(
    make: Callable[[], PreTrainedModel],
    wrapped: bool,
    options: dict[str, bool],
    caplog: pytest.LogCaptureFixture,
) -> None:
    inner = make().train()
    model = Wrapper(inner) if wrapped else inner
    dense = copy.deepcopy(model)
    loss_of(dense, inner).backward()
    optimizer = MaskedAdamW(model, Mask.random(model, 0.5, seed=0))
    inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    with caplog.at_level(logging.WARNING):
        loss_of(model, inner).backward()
    assert caplog.text.count("switched to use_reentrant=False") == 1
    assert "no gradient reached" not in caplog.text
    expected = {name: p.grad.flatten() for name, p in dense.named_parameters() if p.grad is not None}
    for support in optimizer.supports:
        found = expected[support.name][optimizer.mask.elements(support.name)]
        torch.testing.assert_close(support.grad, found, rtol=1e-4, atol=1e-7)


def test_nothing_is_said_once_they_are_disabled(caplog: pytest.LogCaptureFixture) -> None:
    model = of_images().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.gradient_checkpointing_disable()
    MaskedAdamW(model, Mask.random(model, 0.5, seed=0))
    loss_of(model, model).backward()
    assert "use_reentrant" not in caplog.text
