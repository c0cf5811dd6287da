"""Models whose weights lie elsewhere than in one piece on one device: trained alike, or refused before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine.cases import CASES
from torch import Tensor, nn
from transformers import PreTrainedModel

from trace_dist import Mask, MaskedAdamW, shard

CASE = CASES["element"]


def transposed(model: PreTrainedModel) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.T.contiguous().T


def expanded(model: PreTrainedModel) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data[:1].expand(weight.shape)


def whole(model: PreTrainedModel) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data[:1].repeat(len(weight), 1)


def trained(change: Callable[[PreTrainedModel], None], backend: str | None) -> list[Tensor]:
    model = CASE.model()
    change(model)
    sharded: Any = model if backend is None else shard(model, backend)
    optimizer = MaskedAdamW(sharded, Mask.random(sharded, 0.3, seed=0), lr=1e-2)
    ids = torch.arange(12).view(2, 6)
    sharded(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    return list(optimizer.model.full_state_dict().values())


@pytest.mark.parametrize("backend", [None, "single", "zero3", "fsdp2"])
@pytest.mark.parametrize(("strided", "plain"), [(transposed, lambda _: None), (expanded, whole)])
def test_strided_weights_are_trained_as_others(
    backend: str | None, strided: Callable[[PreTrainedModel], None], plain: Callable[[PreTrainedModel], None]
) -> None:
    for found, expected in zip(trained(strided, backend), trained(plain, backend), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def enter(model: nn.Module) -> None:
    MaskedAdamW(model, Mask.random(model, 0.3, seed=0))


def offloaded(model: PreTrainedModel) -> None:
    """As ``device_map`` leaves what it has put on the disk."""
    model.model.layers[1].to("meta")


def dispatched(model: PreTrainedModel) -> None:
    model.hf_device_map = {"model": 0, "lm_head": "cpu"}


@pytest.mark.parametrize("way", [enter, shard, lambda model: shard(model, "fsdp2")])
@pytest.mark.parametrize(
    ("change", "places"), [(offloaded, "cpu, meta"), (dispatched, "0, cpu")], ids=["offloaded", "dispatched"]
)
def test_weights_on_several_devices_are_refused(
    way: Callable[[nn.Module], object], change: Callable[[PreTrainedModel], None], places: str
) -> None:
    model = CASE.model()
    change(model)
    with pytest.raises(ValueError, match=f"model: its weights lie on {places}; load it without device_map"):
        way(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("backend", ["single", "zero3", "fsdp2"])
def test_weights_without_values_are_refused(backend: str) -> None:
    with pytest.raises(
        ValueError, match=r"model: 'model\.embed_tokens\.weight' has no values \(meta device\)"
    ):
        shard(CASE.model().to("meta"), backend)


def test_a_plain_model_without_values_is_refused() -> None:
    model = CASE.model()
    mask = Mask.random(model, 0.3)
    with pytest.raises(
        ValueError, match=r"model: 'model\.embed_tokens\.weight' has no values \(meta device\)"
    ):
        MaskedAdamW(model.to("meta"), mask)


@pytest.mark.parametrize("options", [{}, {"offload": "cpu"}])
def test_two_parameters_in_one_memory_are_refused_where_copies_are_kept(options: dict[str, Any]) -> None:
    """As where ``load_state_dict(assign=True)`` has untied a head."""
    dtype = torch.float32 if options else torch.bfloat16
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)).to(dtype)
    model[1].weight.data = model[0].weight.data
    for sharded in (model, shard(model)):
        with pytest.raises(ValueError, match=r"'0\.weight' and '1\.weight' are two parameters in one memory"):
            MaskedAdamW(sharded, Mask.random(model, 0.3, maskable="1|2"), **options)
        MaskedAdamW(sharded, Mask.random(model, 0.3, maskable="2"), **options)


@pytest.mark.parametrize("way", [enter, shard])
def test_a_weight_is_not_cut_off_from_the_one_whose_transpose_it_is(
    way: Callable[[nn.Module], object],
) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6))
    model[1].weight.data = model[0].weight.data.T
    with pytest.raises(
        ValueError, match=r"model: '0\.weight' and '1\.weight' are two parameters in one memory"
    ):
        way(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("maskable", ["linear", "all"])
def test_parameters_that_are_views_of_one_tensor_are_trained_as_others(maskable: str) -> None:
    model, flat = CASE.model(), CASE.model()
    memory = torch.nn.utils.parameters_to_vector(flat.parameters()).detach()
    torch.nn.utils.vector_to_parameters(memory, flat.parameters())
    ids = torch.arange(12).view(2, 6)
    for each in (model, flat):
        optimizer = MaskedAdamW(each, Mask.random(each, 0.3, seed=0, maskable=maskable), lr=1e-2)
        each(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert torch.equal(memory, torch.nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(memory, torch.nn.utils.parameters_to_vector(flat.parameters()))
