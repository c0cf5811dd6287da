"""What a loss does with masked weights beside their layers is found, as dense training finds it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from engine.cases import CASES, VOCAB, batches
from engine.toy import WIDTH, Toy, toy_loss
from torch import Tensor
from torch.func import functional_call

from trace_dist import Mask, MaskedAdamW
from trace_dist.sharding.masked_linear import MaskedLinear

CASE = CASES["element"]
IDS = batches(CASE)[0][0]
X = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def penalised(model: Toy) -> Tensor:
    return toy_loss(model(X)) + sum((p - 0.1).square().sum() for p in model.parameters() if p.requires_grad)


def through_the_weight(model: Toy) -> Tensor:
    """As fused losses do with ``lm_head.weight``, after the model has run."""
    return toy_loss(F.linear(model(X), model.first.weight))


def with_a_gradient_of_a_gradient(model: Toy) -> Tensor:
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(toy_loss(model(x)), x, create_graph=True)
    return grad.square().sum()


def on_other_weights(model: Toy) -> Tensor:
    weights = {name: 1.1 * p for name, p in model.named_parameters()}
    return toy_loss(functional_call(model, weights, (X,)))


def after_a_step_of_an_inner_loop(model: Toy) -> Tensor:
    weights = {name: p for name, p in model.named_parameters() if name.endswith("weight")}
    grads = torch.autograd.grad(toy_loss(model(X)), list(weights.values()), create_graph=True)
    moved = {name: p - 0.5 * grad for (name, p), grad in zip(weights.items(), grads, strict=True)}
    return toy_loss(functional_call(model, moved, (X,)))


LOSSES = (
    penalised,
    through_the_weight,
    with_a_gradient_of_a_gradient,
    on_other_weights,
    after_a_step_of_an_inner_loop,
)


def check(
    loss_of: Callable[[Toy], Tensor], granularity: str, prepare: Callable[[Toy], object] = lambda _: 0
) -> None:
    model, dense = Toy().double(), Toy().double()
    prepare(model)
    prepare(dense)
    mask = Mask.random(model, 0.5, granularity, seed=1, maskable="all")
    optimizer = MaskedAdamW(model, mask)
    assert type(model.first) is MaskedLinear
    for _ in range(2):
        loss_of(model).backward()
        loss_of(dense).backward()
    for support in optimizer.supports:
        expected = dense.get_parameter(support.name).grad
        assert expected is not None
        torch.testing.assert_close(
            support.grad, expected.flatten()[mask.elements(support.name)], msg=support.name
        )
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("granularity", ["element", "row", "column"])
@pytest.mark.parametrize("loss_of", LOSSES)
def test_gradients_are_the_dense_ones(loss_of: Callable[[Toy], Tensor], granularity: str) -> None:
    if loss_of is after_a_step_of_an_inner_loop and granularity == "column":
        pytest.skip("refused")
    check(loss_of, granularity)


def test_hooks_of_others_are_called() -> None:
    def hooked(model: Toy) -> None:
        model.first.weight.register_hook(torch.square)

    def loss_of(model: Toy) -> Tensor:
        if not model.shared.weight._backward_hooks:
            model.shared.weight.register_hook(torch.sin)
        return toy_loss(model(X))

    check(loss_of, "row", hooked)


def test_a_weight_that_is_frozen_meanwhile_gets_no_gradient() -> None:
    model = Toy()
    optimizer = MaskedAdamW(model, Mask.random(model, 0.5, seed=1), weight_decay=0.1)
    before = model.first.weight.clone()
    for trained in (False, True):
        model.first.weight.requires_grad_(trained)
        toy_loss(model(X.float())).backward()
        optimizer.step()
        assert torch.equal(model.first.weight, before) is not trained


def test_a_weight_of_which_columns_alone_are_known() -> None:
    model = Toy()
    MaskedAdamW(model, Mask.random(model, 0.5, "column", seed=1))
    loss = toy_loss(model(X.float()))
    with pytest.raises(ValueError, match="a weight whose mask is of columns"):
        torch.autograd.grad(loss, model.first.weight)


def test_a_parameter_that_was_replaced_is_named_in_the_backward_pass() -> None:
    model = CASE.model()
    MaskedAdamW(model, Mask.random(model, 0.5, seed=1, maskable="embed|up_proj"))
    model.resize_token_embeddings(VOCAB + 7)
    with pytest.raises(
        ValueError, match=r"'model.embed_tokens.weight' was replaced in the model since the mask"
    ):
        model(input_ids=IDS, labels=IDS).loss.backward()
