"""Gradients that a loop assigns are those that the next step uses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engine.toy import WIDTH, Toy, toy_loss
from torch import nn

from trace_dist import Mask, MaskedAdamW

X = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
HYPER = {"lr": 1e-2, "weight_decay": 0.1}


def project(parameters: list[nn.Parameter]) -> None:
    """As loops of several tasks do, which put the gradients of one in the way of another's."""
    for p in parameters:
        assert p.grad is not None
        p.grad = p.grad.clone().square()


def add(parameters: list[nn.Parameter]) -> None:
    for p in parameters:
        assert p.grad is not None
        p.grad += 0.5


def clear_some(parameters: list[nn.Parameter]) -> None:
    for p in parameters[:3]:
        p.grad = None


@pytest.mark.parametrize("change", [project, add, clear_some])
def test_as_dense_adamw(change: Callable[[list[nn.Parameter]], None]) -> None:
    model, dense = Toy().double(), Toy().double()
    masked = MaskedAdamW(model, Mask.random(model, 1.0, maskable="all"), **HYPER)
    plain = torch.optim.AdamW(dense.parameters(), **HYPER)
    for _ in range(3):
        for each, optimizer in ((model, masked), (dense, plain)):
            toy_loss(each(X)).backward()
            change(optimizer.param_groups[0]["params"])
            toy_loss(each(X.flip(0) * 2)).backward()
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(model.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_gradient_that_does_not_fit_is_refused() -> None:
    model = Toy()
    optimizer = MaskedAdamW(model, Mask.random(model, 0.5))
    with pytest.raises(RuntimeError):
        optimizer.param_groups[0]["params"][0].grad = torch.zeros(3)
