"""One optimizer after another on the same model, as a stream of tasks makes them; the caller prepared it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.cases import CASES, batches
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from trace_dist import Mask, MaskedAdamW, shard
from trace_dist.bank.delta import Snapshot, applied, extract_delta
from trace_dist.masks import UnitLayout
from trace_dist.sharding import ShardedModel
from trace_dist.sharding.prepared import as_sharded
from trace_dist.utils import dist

IDS = batches(CASES["element"])[0][0]


def by_hand(name: str) -> nn.Module:
    dist.ensure_group()
    model = CASES[name].model()
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


MAKERS: dict[str, Callable[[], nn.Module | ShardedModel]] = {
    "hooks alone": CASES["gpt2-conv1d"].model,  # Conv1D everywhere
    "linear layers and hooks": CASES["element"].model,
    "experts": CASES["experts"].model,
    "compiled": lambda: torch.compile(CASES["element"].model(), backend="eager"),  # type: ignore[dict-item,return-value]
    "fully_shard": lambda: by_hand("element"),
    "shard fsdp2": lambda: shard(CASES["element"].model(), "fsdp2"),
}


def mask_of(model: nn.Module | ShardedModel, seed: int) -> Mask:
    return Mask.random(model, 0.3, "element", seed=seed, maskable="all")


def trained(model: nn.Module | ShardedModel, optimizer: MaskedAdamW) -> dict[str, Tensor]:
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer.model.full_state_dict()


@pytest.mark.parametrize("kind", MAKERS)
def test_the_second_trains_as_if_it_were_the_first(kind: str) -> None:
    """Also after an evaluation, which leaves FSDP2's root gathered."""
    model, twin = MAKERS[kind](), MAKERS[kind]()
    first_mask, mask = (mask_of(model, seed) for seed in (1, 2))
    first = MaskedAdamW(model, first_mask, lr=1e-2)
    with torch.no_grad():
        model(input_ids=IDS)
    second = MaskedAdamW(model, mask, lr=1e-2)
    found, expected = trained(model, second), trained(twin, MaskedAdamW(twin, mask, lr=1e-2))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    with pytest.raises(ValueError, match="another mask was attached"):
        first.step()
    gradient = weakref.ref(first.supports[0])
    del first
    gc.collect()
    assert gradient() is None


@pytest.mark.parametrize("kind", MAKERS)
def test_a_model_that_was_evaluated_first_is_trained(kind: str) -> None:
    model, twin = MAKERS[kind](), MAKERS[kind]()
    mask = mask_of(model, 1)
    with torch.no_grad():
        model(input_ids=IDS)
    found, expected = (trained(each, MaskedAdamW(each, mask, lr=1e-2)) for each in (model, twin))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("kind", MAKERS)
def test_a_mask_that_is_refused_leaves_the_first_at_work(kind: str) -> None:
    model, twin = MAKERS[kind](), MAKERS[kind]()
    mask = mask_of(model, 1)
    optimizer, reference = (MaskedAdamW(each, mask, lr=1e-2) for each in (model, twin))
    wrong = Mask({"w": torch.tensor([0], dtype=torch.int32)}, {"w": UnitLayout((4, 4), 1)}, "element")
    with pytest.raises(ValueError, match="'w' is not in the model"):
        MaskedAdamW(model, wrong)
    found, expected = trained(model, optimizer), trained(twin, reference)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_what_lies_around_the_model_may_change_between_tasks() -> None:
    model, twin = CASES["element"].model(), CASES["element"].model()
    first, mask = MaskedAdamW(model, mask_of(model, 1)), mask_of(model, 2)
    wrapped: nn.Module = torch.compile(model, backend="eager")  # type: ignore[assignment]
    second = MaskedAdamW(wrapped, mask, lr=1e-2)
    assert second.model.roots == [wrapped, model]
    found, expected = trained(wrapped, second), trained(twin, MaskedAdamW(twin, mask, lr=1e-2))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    with pytest.raises(ValueError, match="another mask was attached"):
        first.step()


def test_a_view_is_made_anew_where_a_parameter_was_replaced() -> None:
    model = CASES["element"].model()
    view = as_sharded(model)
    model.requires_grad_(True)
    assert as_sharded(model) is view
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.model.norm.weight = nn.Parameter(torch.ones_like(model.model.norm.weight))
    other = as_sharded(model)
    assert other is not view
    assert other.local("model.norm.weight").data_ptr() == model.model.norm.weight.data_ptr()


def test_sharding_again_gives_the_same_model() -> None:
    module = CASES["element"].model()
    assert shard(module, "fsdp2") is shard(module, "fsdp2")


@pytest.mark.parametrize("maskable", ["linear", ".*norm.*"])
def test_data_parallel_put_around_it_later_is_refused(maskable: str) -> None:
    """nn.DataParallel makes its copies by this method."""
    model = CASES["element"].model()
    optimizer = MaskedAdamW(model, Mask.random(model, 0.3, "element", seed=0, maskable=maskable))
    for part in (model, *([model.model.layers[0].mlp.up_proj] if maskable == "linear" else [])):
        with pytest.raises(ValueError, match=r"nn\.DataParallel, .*; start one process for each GPU"):
            part._replicate_for_data_parallel()
    optimizer.model.detach()
    assert model._replicate_for_data_parallel()._is_replica


def assign(model: nn.Module) -> None:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", [assign, lambda model: model.resize_token_embeddings(120)])
def test_values_of_parameters_that_were_replaced_are_neither_saved_nor_changed(
    change: Callable[[Any], object], tmp_path: Path
) -> None:
    model = shard(CASES["element"].model())
    mask = Mask.random(model, 0.3, seed=0, maskable="all")
    delta = extract_delta(model, mask, "task")
    change(model.module)
    uses: list[Callable[[], object]] = [
        lambda: model.save_pretrained(tmp_path / "saved"),
        lambda: extract_delta(model, mask, "task"),
        lambda: applied(model, delta).__enter__(),
        lambda: Snapshot(model, mask),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=r"was replaced since the model was sharded, .* shard\(\) again"):
            use()
    shard(model.module).save_pretrained(tmp_path / "again")


def test_a_head_that_was_untied_is_saved_by_a_new_view(tmp_path: Path) -> None:
    model = shard(CASES["element"].model())
    head = model.module.lm_head
    head.weight = nn.Parameter(head.weight.detach().clone())
    with pytest.raises(ValueError, match=r"'lm_head\.weight' came after the model was sharded"):
        model.save_pretrained(tmp_path)
    assert "lm_head.weight" in shard(model.module).full_state_dict()
