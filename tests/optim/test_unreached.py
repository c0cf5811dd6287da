"""A masked parameter that no gradient reached in a step stays as it is: no weight decay, no momentum, no older."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine.rank_unreached import LEFT_OUT, dense, masked
from engine.toy import STEPS, WIDTH, Toy, toy_loss
from torch import nn

from trace_dist import Mask, MaskedAdamW, quantize_nf4, shard


def assert_close(state: dict[str, torch.Tensor], num_ranks: int, uneven: bool) -> None:
    for name, value in dense(num_ranks, uneven).items():
        torch.testing.assert_close(state[name].view(value.shape), value, rtol=0, atol=2e-6, msg=name)


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("clips", [False, True])
def test_in_one_process(offload: str, clips: bool) -> None:
    """Clipping to a norm that is never reached changes the path that the update takes, and nothing else."""
    optimizer, state = masked(
        shard(Toy(), "single"), uneven=False, offload=offload, max_grad_norm=1e6 if clips else None
    )
    assert_close(state, 1, uneven=False)
    steps = {support.name: kept["step"] for support, kept in optimizer.compact()}
    assert steps == {name: STEPS - len(LEFT_OUT) * ("optional" in name) for name in steps}


@pytest.mark.launcher
@pytest.mark.parametrize("backend", ["zero3", "fsdp2", "plain", "ddp"])
def test_on_ranks(world, backend: str) -> None:
    """A parameter that one rank's loss alone depends on counts as reached on all."""
    found = world(2).reports
    state = {name: torch.tensor(value) for name, value in found[0]["unreached"][backend]["state"].items()}
    assert_close(state, 2, uneven=backend != "zero3")
    for report in found:
        assert report["unreached"][backend]["steps"]["optional.weight"] == STEPS - len(LEFT_OUT)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"state_dtype": "8bit"},
        {"state_dtype": "bfloat16"},
        {"master": False},
        {"state_dtype": "8bit", "offload": "cpu"},
    ],
    ids=str,
)
@pytest.mark.parametrize("quantized", [False, True])
def test_values_and_states_stay_bit_identical(options: dict[str, Any], quantized: bool) -> None:
    """Weight decay and momentum included, whatever the states are kept in, and over a 4-bit base."""
    module: nn.Module = Toy().bfloat16()
    model = shard(quantize_nf4(module) if quantized else module, "single")
    optimizer = MaskedAdamW(
        model, Mask.random(model, 0.5, maskable="weight"), lr=0.1, weight_decay=0.5, **options
    )
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()

    def step(skip: bool) -> None:
        for _ in range(2):
            model.backward(toy_loss(model(x, skip=skip)))
        optimizer.step()
        optimizer.zero_grad()

    def kept(name: str) -> list[torch.Tensor]:
        (state,) = (state for support, state in optimizer.compact() if support.name == name)
        tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
        return [
            torch.tensor(state["step"]),
            model.full_state_dict()[name],
            *(value.clone() for value in tensors),
        ]

    step(skip=False)
    before, others = kept("optional.weight"), kept("first.weight")
    step(skip=True)
    assert all(map(torch.equal, kept("optional.weight"), before))
    assert not all(map(torch.equal, kept("first.weight"), others))
    step(skip=False)
    assert not torch.equal(kept("optional.weight")[1], before[1])


def test_one_micro_batch_of_several_is_enough() -> None:
    model = shard(Toy(), "single")
    optimizer = MaskedAdamW(model, Mask.random(model, 1.0, maskable="weight"), lr=0.1)
    before = model.full_state_dict()["optional.weight"]
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    for skip in (True, False, True):
        model.backward(toy_loss(model(x, skip=skip)))
    optimizer.step()
    assert not torch.equal(model.full_state_dict()["optional.weight"], before)


def test_a_step_without_a_backward_pass_changes_nothing() -> None:
    model = shard(Toy(), "single")
    optimizer = MaskedAdamW(model, Mask.random(model, 1.0, maskable="weight"), lr=0.1, weight_decay=0.5)
    before = model.full_state_dict()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.full_state_dict().items())


def test_a_loss_that_no_masked_entry_took_part_in_is_refused() -> None:
    model = shard(Toy(), "single")
    model.attach(Mask.random(model, 1.0, maskable="optional.weight"))
    with pytest.raises(ValueError, match="no rank's loss depends on a masked entry"):
        model.backward(toy_loss(model(torch.ones(3, WIDTH), skip=True)))
