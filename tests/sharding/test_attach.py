"""Masks that do not belong to the model are refused before anything is changed."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.utils.prune
from engine.cases import CASES, batches
from engine.toy import WIDTH, Toy, toy_loss
from torch import nn

from trace_dist import Mask, MaskedAdamW, shard
from trace_dist.bank.delta import check_base
from trace_dist.masks import UnitLayout
from trace_dist.models import fingerprint

CASE = CASES["element"]


def mask_of(name: str, shape: tuple[int, ...], **meta: str) -> Mask:
    return Mask(
        {name: torch.tensor([0, 3], dtype=torch.int32)}, {name: UnitLayout(shape, 1)}, "element", meta
    )


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            mask_of("model.layers.9.mlp.up_proj.weight", (51, 36)),
            "'model.layers.9.mlp.up_proj.weight' is not in the model",
        ),
        (mask_of("model.norm.weight", (40,)), r"has shape \(40,\) in the mask but \(36,\) in the model"),
    ],
)
def test_mask_of_another_model(mask: Mask, message: str) -> None:
    model = shard(CASE.model(), "single")
    with pytest.raises(ValueError, match=message):
        MaskedAdamW(model, mask)
    assert not any("forward" in vars(module) for module in model.module.modules())


@pytest.mark.launcher
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_with_different_masks(world, num_ranks: int) -> None:
    """The error comes on every rank, so none waits for another."""
    for report in world(num_ranks).reports:
        assert "the ranks hold different masks" in report["attaching"]["different"]
        assert report["attaching"]["rate"].startswith("lr: rank 0 has 0.1, rank 1 has 1.1")


def test_a_second_mask_starts_anew_and_the_first_one_rests() -> None:
    """The first step of Adam moves an entry by ``lr``, whatever its gradient, unless it is counted as a later one (pitfall 4);
    entries that trained before are frozen now, momentum or not (pitfall 1)."""
    model = shard(Toy(), "single")
    first = Mask.random(model, 0.5, "element", seed=0, maskable="weight")
    second = Mask.random(model, 1.0, "element", maskable="weight") - first
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    for mask, num_steps in ((first, 20), (second, 1)):
        before = model.full_state_dict()
        optimizer = MaskedAdamW(model, mask, lr=1e-2, eps=1e-12)
        for _ in range(num_steps):
            model.backward(model(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    for name in second:
        moved = (model.full_state_dict()[name] - before[name]).abs()
        assert not bool(moved[first.dense(name)].any())
        torch.testing.assert_close(
            moved[second.dense(name)], torch.full_like(moved[second.dense(name)], 1e-2), rtol=0.01, atol=0
        )


def test_empty_mask() -> None:
    with pytest.raises(ValueError, match="selects nothing"):
        Mask({}, {"w": UnitLayout((4, 4), 1)}, "element")


def test_fingerprint_of_another_model() -> None:
    model = CASE.model()
    mine = fingerprint(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(1)
    other = fingerprint(model)
    mask = mask_of("model.norm.weight", (36,), model=mine)
    check_base(mask, mine, "mask")
    check_base(mask_of("model.norm.weight", (36,)), other, "a mask that names no model")
    with pytest.raises(ValueError, match=f"mask rev: made for model {mine}, but the model given is {other}"):
        check_base(mask, other, "mask rev")


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend='zero4': unknown; use one of single, zero3"):
        shard(CASE.model(), "zero4")


def by_weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        # Of torch, which has another one now; checkpoints of models that use this one stay.
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layer)


COMPUTED = pytest.mark.parametrize(
    "compute",
    [
        partial(nn.utils.prune.l1_unstructured, name="weight", amount=0.5),
        nn.utils.spectral_norm,
        by_weight_norm,
        nn.utils.parametrizations.weight_norm,
    ],
    ids=["prune", "spectral_norm", "weight_norm", "parametrization"],
)


@COMPUTED
def test_a_layer_whose_weight_is_computed(compute: Callable[[nn.Module], object]) -> None:
    """What it is computed from trains like any other parameter, and the layers beside it as before."""
    model, other = CASE.model().train(), CASE.model().train()
    for each in (model, other):
        torch.manual_seed(0)
        compute(each.model.layers[0].mlp.up_proj)
    mask = Mask.random(model, 0.5, maskable="up_proj|down_proj")
    optimizer = MaskedAdamW(model, mask)
    ids = batches(CASE)[0][0]
    for each in (model, other):
        each(input_ids=ids).logits.square().mean().backward()
    dense = {name: p.grad for name, p in other.named_parameters()}
    assert any("layers.0.mlp.up_proj" in name for name in mask)
    for support in optimizer.supports:
        expected = dense[support.name].flatten()[mask.elements(support.name)]
        torch.testing.assert_close(support.grad, expected, rtol=1e-4, atol=1e-7)


@COMPUTED
def test_a_layer_whose_weight_is_computed_from_now_on(compute: Callable[[nn.Module], object]) -> None:
    """The layer is torch's again, and the optimizer asks for a new one."""
    model, other = CASE.model().train(), CASE.model().train()
    ids = batches(CASE)[0][0]
    optimizer = MaskedAdamW(model, Mask.random(model, 0.5, maskable="up_proj|down_proj"))
    for each in (model, other):
        torch.manual_seed(0)
        compute(each.model.layers[0].mlp.up_proj)
    assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)
    for each in (model, other):
        each(input_ids=ids).logits.square().mean().backward()
    with pytest.raises(
        ValueError, match=r"up_proj\.weight' was replaced in the model since, .*; build the optimizer"
    ):
        optimizer.step()
    optimizer = MaskedAdamW(model, Mask.random(model, 0.5, maskable="up_proj|down_proj"))
    for each in (model, other):
        each.zero_grad()
        each(input_ids=ids).logits.square().mean().backward()
    dense = {name: p.grad for name, p in other.named_parameters()}
    for support in optimizer.supports:
        expected = dense[support.name].flatten()[optimizer.mask.elements(support.name)]
        torch.testing.assert_close(support.grad, expected, rtol=1e-4, atol=1e-7)


def test_a_mask_of_a_part_replaces_one_of_the_whole() -> None:
    """Of two optimizers on the same parameters the later one trains; the earlier one says so."""
    model = CASE.model()
    for inner, outer in ((model.model, model), (model, model.model)):
        first, second = (MaskedAdamW(each, Mask.random(each, 0.3, maskable="all")) for each in (outer, inner))
        ids = batches(CASE)[0][0]
        model(input_ids=ids, labels=ids).loss.backward()
        assert all(support.reached for support in second.supports)
        with pytest.raises(ValueError, match="another mask was attached"):
            first.step()


def test_masks_of_other_parameters_of_a_part_and_of_the_whole() -> None:
    """As for two learning rates: both are trained, whichever came first."""
    for order in (1, -1):
        model = Toy()
        holder = nn.Sequential(model, nn.Linear(WIDTH, WIDTH))
        masks = [(holder, "1.weight|0.last"), (model, "first|shared|optional.bias")][::order]
        optimizers = [
            MaskedAdamW(each, Mask.random(each, 0.5, maskable=maskable)) for each, maskable in masks
        ]
        holder(torch.ones(2, WIDTH)).square().mean().backward()
        for optimizer in optimizers:
            assert all(bool(support.grad.any()) for support in optimizer.supports)
            optimizer.step()


def test_what_is_no_model_or_no_mask_is_named() -> None:
    """As other optimizers, and Trainer's ``optimizer_cls_and_kwargs``, would have it."""
    model = Toy()
    mask = Mask.random(model, 0.5)
    not_a_model = "model: is a generator, not a torch.nn.Module; give the model itself"
    for enter in (lambda m: MaskedAdamW(m, mask), shard, lambda m: Mask.random(m, 0.5)):
        with pytest.raises(ValueError, match=not_a_model):
            enter(model.parameters())  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match=r"mask: is a str, not a mask; give one of Mask.load\(path\)"):
        MaskedAdamW(model, "task.safetensors")  # type: ignore[arg-type]
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(TypeError, match="unsupported operand"):
        mask | {"first.weight"}  # type: ignore[operator]


@pytest.mark.parametrize("maskable", ["linear", "all"])
def test_a_model_that_nobody_holds_is_freed(maskable: str) -> None:
    """Hooks of parameters kept it, with all of its weights, for ever."""

    def trained() -> weakref.ref[nn.Module]:
        model = Toy()
        optimizer = MaskedAdamW(model, Mask.random(model, 0.5, seed=1, maskable=maskable))
        toy_loss(model(torch.ones(3, WIDTH))).backward()
        optimizer.step()
        return weakref.ref(model)

    model = trained()
    gc.collect()
    assert model() is None
