"""A masked linear layer trains where the model uses its ``.weight``, whether the layer is called or not."""

from __future__ import annotations

import copy

import pytest
import torch
from engine.rank_by_weight import MASKABLE, MODELS, ByWeight, dense_gradients, ids_of, loss_of
from torch import nn

from trace_dist import Mask, MaskedAdamW, quantize_nf4, shard
from trace_dist.models.nf4 import NF4Linear
from trace_dist.sharding.masked_linear import MaskedLinear


def dequantized(name: str) -> nn.Module:
    """The dense model that holds what NF4 makes of the linear weights."""
    dense = MODELS[name]()
    for path, layer in quantize_nf4(MODELS[name]()).named_modules():
        if isinstance(layer, NF4Linear):
            dense.get_submodule(path).weight.data.copy_(layer.weight)
    return dense


def assert_gradients(found: dict[str, torch.Tensor], mask: Mask, dense: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(mask)
    for name, grad in found.items():
        expected = dense[name].flatten()[mask.elements(name)]
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("granularity", ["element", "row", "column"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_dense_ones(name: str, granularity: str, quantized: bool) -> None:
    module = quantize_nf4(MODELS[name]()) if quantized else MODELS[name]()
    mask = Mask.random(module, 0.5, granularity, seed=1, maskable=MASKABLE[name])
    optimizer = MaskedAdamW(module, mask)
    loss_of(module, ids_of(0)).backward()
    dense = dense_gradients(dequantized(name) if quantized else MODELS[name](), 1)
    assert_gradients({support.name: support.grad for support in optimizer.supports}, mask, dense)


@pytest.mark.parametrize("name", ["mamba", "jamba"])
def test_with_recomputed_layers(name: str) -> None:
    module = MODELS[name]().train()
    module.gradient_checkpointing_enable()
    mask = Mask.random(module, 0.5, seed=1, maskable=MASKABLE[name])
    optimizer = MaskedAdamW(module, mask)
    loss_of(module, ids_of(0)).backward()
    found = {support.name: support.grad for support in optimizer.supports}
    assert_gradients(found, mask, dense_gradients(MODELS[name]().train(), 1))


def test_the_body_alone() -> None:
    """As for a loss of one's own on the hidden states."""
    module = MODELS["mamba"]()
    mask = Mask.random(module, 0.5, seed=1, maskable="dt_proj.weight")
    optimizer = MaskedAdamW(module, mask)
    module.backbone(input_ids=ids_of(0)).last_hidden_state.square().mean().backward()
    other = MODELS["mamba"]()
    other.backbone(input_ids=ids_of(0)).last_hidden_state.square().mean().backward()
    dense = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    assert_gradients({support.name: support.grad for support in optimizer.supports}, mask, dense)


@pytest.mark.launcher
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", ["zero3", "fsdp2", "plain", "zero3 nf4", "fsdp2 nf4"])
def test_on_ranks(world, backend: str, name: str) -> None:
    module = MODELS[name]()
    mask = Mask.random(module, 0.5, seed=1, maskable=MASKABLE[name])
    parts = [report["by_weight"][f"{backend}/{name}"] for report in world(2).reports]
    found = {}
    for parameter in mask:
        pieces = sorted(part[parameter] for part in parts)
        found[parameter] = torch.tensor([value for _, piece in pieces for value in piece])
    assert_gradients(found, mask, dense_gradients(dequantized(name) if "nf4" in backend else module, 2))


def test_outside_a_pass_weight_is_the_parameter() -> None:
    module = ByWeight()
    parameter = module.used.weight
    model = shard(module, "single")
    model.attach(Mask.random(model, 0.5, maskable="weight"))
    assert type(module.used) is MaskedLinear
    assert module.used.weight is parameter
    assert module.get_parameter("used.weight") is parameter
    with pytest.raises(RuntimeError):
        model(input_ids=torch.zeros(1, 2))  # one_hot takes integers alone
    assert module.used.weight is parameter
    with torch.no_grad():
        assert torch.equal(loss_of(model, ids_of(0)), loss_of(ByWeight(), ids_of(0)))
    clone = copy.deepcopy(module)
    with torch.no_grad():
        clone.used.weight.fill_(1.0)
    assert not torch.equal(clone.used.weight, module.used.weight)
    model.detach()
    assert type(module.used) is nn.Linear
    assert module.used.weight is parameter
    assert not module._forward_hooks


def test_a_second_optimizer_on_a_plain_model_takes_over() -> None:
    module = ByWeight()
    first = MaskedAdamW(module, Mask.random(module, 0.5, seed=0, maskable="weight"))
    mask = Mask.random(module, 0.5, seed=1, maskable="weight")
    second = MaskedAdamW(module, mask)
    loss_of(module, ids_of(0)).backward()
    dense = dense_gradients(ByWeight(), 1)
    assert_gradients({support.name: support.grad for support in second.supports}, mask, dense)
    assert not any(bool(support.grad.any()) for support in first.supports)
