"""Penalties have the gradient that autograd finds for their formula, in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trace_dist.continual.methods.ella import ELLA
from trace_dist.continual.methods.ewc import EWC
from trace_dist.continual.methods.olora import overlap_slope
from trace_dist.continual.methods.osft import outside
from trace_dist.continual.methods.penalised import Penalised
from trace_dist.continual.methods.ps import PS, larger
from trace_dist.continual.methods.slao import orthonormal

FORMULAS: dict[type[Penalised], Callable[[Tensor, Tensor], Tensor]] = {
    EWC: lambda moved, memory: (memory * moved**2).sum() / 2,
    ELLA: lambda moved, memory: ((moved * memory) ** 2).sum(),
    PS: lambda moved, memory: torch.relu(-moved * memory).sum(),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", FORMULAS)
def test_the_slope_is_that_of_the_formula(kind: type[Penalised]) -> None:
    moved, memory = random(7, 5).requires_grad_(), random(7, 5, seed=1)
    memory = memory.abs() if kind is EWC else memory
    FORMULAS[kind](moved, memory).backward()
    torch.testing.assert_close(kind.slope(moved.detach(), memory), moved.grad)
    assert not kind.slope(torch.zeros(3, dtype=torch.float64), memory[0, :3]).any()


def test_a_two_layer_model_is_pulled_as_by_the_formula() -> None:
    """The whole loss, penalty and all, of a small model: what is added to its gradients is what autograd adds."""
    weights = [random(4, 3), random(2, 4, seed=1)]
    start, fisher = [w + 0.1 for w in weights], [random(*w.shape, seed=2).abs() for w in weights]
    inputs, strength = random(6, 3, seed=3), 30.0

    def gradients(penalty: bool) -> list[Tensor]:
        leaves = [w.clone().requires_grad_() for w in weights]
        loss = (torch.tanh(inputs @ leaves[0].T) @ leaves[1].T).square().mean()
        if penalty:
            parts = zip(leaves, start, fisher, strict=True)
            loss = loss + strength / 2 * sum((f * (w - s) ** 2).sum() for w, s, f in parts)
        return list(torch.autograd.grad(loss, leaves))

    ours = [
        plain + strength * EWC.slope(w - s, f)
        for plain, w, s, f in zip(gradients(False), weights, start, fisher, strict=True)
    ]
    for mine, expected in zip(ours, gradients(True), strict=True):
        torch.testing.assert_close(mine, expected)


def test_the_overlap_of_subspaces() -> None:
    a, earlier = random(3, 8).requires_grad_(), random(5, 8, seed=1)
    (earlier @ a.T).square().sum().backward()
    torch.testing.assert_close(overlap_slope(a.detach(), earlier), a.grad)
    basis = torch.linalg.qr(random(8, 8, seed=2)).Q
    assert float(overlap_slope(basis[:3], basis[3:]).abs().max()) < 1e-12


def test_the_larger_update_stays() -> None:
    new, past = torch.tensor([1.0, -3.0, 2.0, 0.0]), torch.tensor([-2.0, 2.0, -2.0, 0.0])
    assert larger(new, past).tolist() == [-2.0, -3.0, -2.0, 0.0]


def test_an_orthonormal_basis_spans_the_same() -> None:
    a = random(3, 8)
    basis = orthonormal(a)
    torch.testing.assert_close(basis @ basis.T, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(a @ basis.T @ basis, a)


@pytest.mark.parametrize("known", [3, 5])
def test_what_lies_outside_frozen_directions(known: int) -> None:
    """Given those that are frozen, or, where all are known, the others."""
    basis, value = torch.linalg.qr(random(5, 5)).Q, random(5, 4, seed=1)
    high, low = basis[:, :2], basis[:, 2:known]
    found = outside(value, None if known == 5 else high, low)
    assert float((high.T @ found).abs().max()) < 1e-12
    torch.testing.assert_close(found + high @ (high.T @ value), value)
