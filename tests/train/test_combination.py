"""Scalars on earlier deltas: their gradient against autograd through the dense weights, what is written, what is put back."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from bank.samples import base_model, make_delta, same_bits
from torch import Tensor
from torch.func import functional_call

from trace_dist import Delta, Mask
from trace_dist.models.roles import role_of
from trace_dist.sharding.base import ShardedModel
from trace_dist.train.combination import GROUPS, CombinationLearner

IDS = torch.randint(0, 101, (5, 9), generator=torch.Generator().manual_seed(3))


def group(name: str) -> int:
    role = role_of(name)
    attention, mlp = role in ("q", "k", "v", "qkv", "o"), role in ("gate", "up", "gate_up", "down")
    return GROUPS.index("attention" if attention else "mlp" if mlp else "other")


def dense(model: ShardedModel, deltas: Sequence[Delta], scalars: Tensor) -> dict[str, Tensor]:
    """W(a), written from its definition."""
    weights = {}
    for name, base in model.module.named_parameters():
        weight = base.detach().clone()
        for row, delta in enumerate(deltas):
            if name in delta.mask.units:
                change = torch.zeros_like(base).flatten()
                at = delta.mask.elements(name)
                change[at] = delta.values[name] - base.detach().flatten()[at]
                weight = weight + scalars[row, group(name)] * change.view_as(base)
        weights[name] = weight
    return weights


def loss_of(model: ShardedModel, weights: dict[str, Tensor]) -> Tensor:
    return functional_call(model.module, weights, (), {"input_ids": IDS, "labels": IDS}).loss


@pytest.fixture
def model() -> ShardedModel:
    return base_model("float64").eval()


def random_deltas(model: ShardedModel, granularity: str) -> list[Delta]:
    """Large parts of the model, so that they overlap; the second one leaves the attention alone."""
    one, two = (
        make_delta(model, name, seed, density=0.3, granularity=granularity) for seed, name in enumerate("ab")
    )
    kept = {name: units for name, units in two.mask.units.items() if group(name) != GROUPS.index("attention")}
    mask = Mask(kept, two.mask.layouts, granularity, {})
    return [one, Delta(mask, {name: two.values[name] for name in kept}, "b")]


@pytest.mark.parametrize("granularity", ["element", "row"])
def test_gradients_and_weights_are_those_of_the_dense_model(model: ShardedModel, granularity: str) -> None:
    before = model.full_state_dict()
    deltas = random_deltas(model, granularity)
    learner = CombinationLearner(model, deltas, lr=0.0)
    at = torch.tensor([[0.3, -0.2, 0.5], [0.0, 0.7, 0.1]], dtype=torch.float64)
    learner.set(at)
    expected = at.clone().requires_grad_()
    reference = base_model("float64").eval()
    loss = loss_of(reference, dense(reference, deltas, expected))
    loss.backward()
    mine = model(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(mine.detach(), loss.detach())
    learner.backward(mine)
    learner.step()
    assert expected.grad is not None
    torch.testing.assert_close(learner.scalars.grad, expected.grad, rtol=1e-9, atol=1e-12)
    assert learner.scalars.grad[1, GROUPS.index("attention")] == 0 != learner.scalars.grad[0, 0]
    learner.restore()
    after = model.full_state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_shrinkage_selects(model: ShardedModel) -> None:
    """Steps of Adam have the length lr at first: a scalar whose shrinkage is as long stays at 0."""
    learner = CombinationLearner(model, random_deltas(model, "element"), lr=0.1, l1=1.0, l2=0.0)
    learner.backward(model(input_ids=IDS, labels=IDS).loss)
    learner.step()
    assert learner.scalars.abs().max() < 1e-6
    learner.restore()
    free = CombinationLearner(model, random_deltas(model, "element"), lr=0.1, l1=0.25, l2=1.0)
    free.backward(model(input_ids=IDS, labels=IDS).loss)
    free.step()
    moved = free.scalars.abs()[free.scalars != 0]
    torch.testing.assert_close(moved.detach(), torch.full_like(moved, 0.075 / 1.1), rtol=1e-3, atol=0)
    free.restore()


def test_bf16_weights_are_put_back_bit_for_bit() -> None:
    model = base_model("bfloat16").eval()
    before = model.full_state_dict()
    learner = CombinationLearner(model, random_deltas(model, "row"), lr=0.1)
    learner.set(torch.full((2, len(GROUPS)), 0.5))
    changed = model.full_state_dict()
    assert not same_bits(changed, before, "bfloat16")
    learner.restore()
    assert same_bits(model.full_state_dict(), before, "bfloat16")
