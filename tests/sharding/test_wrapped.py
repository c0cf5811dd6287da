"""Compiled models, DDP and both: masks, optimizers and files have the plain model's names, and training is the plain model's."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as td
from engine.cases import CASES, batches
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from trace_dist import Mask, MaskedAdamW, shard
from trace_dist.checkpoint import load_checkpoint, save_checkpoint

CASE = CASES["element"]
IDS = batches(CASE)[0][0]


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


def by_layer(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def wrapped(module: nn.Module) -> nn.Module:
        layers = module.model.layers
        for i, layer in enumerate(layers):
            layers[i] = wrap(layer)
        return module

    return wrapped


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": compiled,
    "layers compiled": by_layer(compiled),
    "layers in checkpoint wrappers": by_layer(checkpoint_wrapper),
    "ddp": DistributedDataParallel,
    "compiled ddp": lambda module: compiled(DistributedDataParallel(module)),
    "ddp of compiled": lambda module: DistributedDataParallel(compiled(module)),
}


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone, for DDP."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    td.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield
    td.destroy_process_group()


def trained(model: nn.Module, mask: Mask) -> MaskedAdamW:
    optimizer = MaskedAdamW(model, mask, lr=1e-2)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_plain_mask_trains_a_wrapped_model_alike(one_rank: None, name: str, tmp_path: Path) -> None:
    plain = CASE.model()
    mask = Mask.random(plain, 0.3, seed=1, maskable="all")
    model = WRAPPERS[name](CASE.model())
    assert Mask.random(model, 0.3, seed=1, maskable="all") == mask
    ours, theirs = trained(model, mask), trained(plain, mask)
    state = ours.model.full_state_dict()
    expected = theirs.model.full_state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=1e-6, msg=key)
    folder = save_checkpoint(tmp_path / "checkpoints", 2, ours, {})
    other = MaskedAdamW(CASE.model(), mask)
    load_checkpoint(folder, other)
    for mine, kept in zip(ours.supports, other.supports, strict=True):
        assert torch.equal(ours.values(mine), other.values(kept))
    ours.model.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(saved[key], value, rtol=0, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["compiled", "layers compiled"])
def test_a_wrapped_model_can_be_sharded(name: str) -> None:
    model = shard(WRAPPERS[name](CASE.model()), "single")
    plain = shard(CASE.model(), "single")
    assert model.names() == plain.names()
    mask = Mask.random(plain, 0.3, seed=1)
    model.attach(mask)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    assert model.full_state_dict().keys() == plain.full_state_dict().keys()
