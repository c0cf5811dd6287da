"""Backward costs nothing below the lowest masked unit: no product, no recomputation, no gathered weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from engine.cases import CASES, batches
from torch.utils._python_dispatch import TorchDispatchMode

from trace_dist import Mask, shard

PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm}


class Products(TorchDispatchMode):
    """Shapes of the matrix products that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in PRODUCTS:
            self.shapes.append(tuple(out.shape))
        return out


def products_of_backward(
    maskable: str, num_layers: int, checkpointing: bool = False
) -> list[tuple[int, ...]]:
    """Shapes of the products in one backward pass of a model whose maskable parameters are all masked."""
    case = replace(CASES["qwen2-biases"], num_layers=num_layers, checkpointing=checkpointing)
    model = shard(case.model(), "single")
    model.attach(Mask.random(model, 0.5, "element", maskable=maskable))
    ids = batches(case)[0][0]
    loss = model(input_ids=ids, labels=ids).loss
    with Products() as products:
        model.backward(loss)
    return products.shapes


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "maskable", [r"q_proj\.weight", r"q_proj\.(weight|bias)", r"q_proj\.bias", "post_attention_layernorm"]
)
def test_the_layers_below_cost_nothing(maskable: str, checkpointing: bool) -> None:
    """The top layer's backward is the same, on top of nothing and on top of two more layers."""
    alone = products_of_backward(rf"layers\.0.*{maskable}", 1, checkpointing)
    on_top = products_of_backward(rf"layers\.2.*{maskable}", 3, checkpointing)
    assert alone == on_top
    assert len(alone) > 0


def test_unmasked_weights_have_no_gradient_product() -> None:
    """Masked is the up projection of the last layer: its own product, and the inputs' gradients of the head and the down one."""
    tokens, hidden, inner, vocabulary = 54, 36, 51, 101
    assert sorted(products_of_backward(r"layers\.1.*up_proj", 2)) == sorted(
        [(tokens, hidden), (tokens, inner), (inner, hidden)]
    )
    assert (vocabulary, hidden) in products_of_backward(r"lm_head|layers\.1.*up_proj", 2)


def test_a_masked_embedding_needs_the_whole_backward() -> None:
    """Also where it is tied to the head, for its gradient comes from both ends."""
    assert len(products_of_backward("embed_tokens", 3)) > len(products_of_backward("embed_tokens", 1))


def test_reentrant_checkpoints_are_switched_to_the_other_kind(caplog: pytest.LogCaptureFixture) -> None:
    case = CASES["element"]
    gradients = []
    for options in ({"use_reentrant": False}, {"use_reentrant": True}):
        module = case.model()
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model = shard(module, "single")
        (support,) = model.attach(Mask.random(model, 0.3, "element", maskable=r"layers\.1.*q_proj"))
        ids = batches(case)[0][0]
        for _ in range(2):
            model.backward(model(input_ids=ids, labels=ids).loss)
        gradients.append(support.grad)
    assert bool(gradients[0].any())
    assert torch.equal(*gradients)
    (message,) = caplog.messages
    assert "switched to use_reentrant=False" in message


@pytest.mark.launcher
@pytest.mark.parametrize("num_ranks", [2])
def test_reentrant_checkpoints_train_alike_on_ranks(world, num_ranks: int) -> None:
    for report in world(num_ranks).reports:
        assert report["depth"]["reentrant"] == report["depth"]["not reentrant"]


@pytest.mark.launcher
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_weight_is_gathered_below(world, checkpointing: bool) -> None:
    """FSDP2 fetches one block ahead of the one in work; the two below that stay where they are."""
    for report in world(2).reports:
        zero3 = set(report["depth"][f"zero3-{checkpointing}"])
        assert "model.layers.3.mlp.down_proj.weight" in zero3
        assert not any(f"layers.{layer}." in name for name in zero3 for layer in (0, 1, 2))
        fsdp2 = set(report["depth"][f"fsdp2-{checkpointing}"])
        assert "model.layers.3" in fsdp2
        assert not {"model.layers.0", "model.layers.1"} & fsdp2
