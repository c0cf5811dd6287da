"""Learning rates of their own for the masked entries, beside dense AdamW in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from engine.cases import CASES, batches
from torch import Tensor

from trace_dist import Mask, MaskedAdamW, shard
from trace_dist.optim.factors import own_factors

HYPER = {"lr": 3e-3, "betas": (0.9, 0.98), "weight_decay": 0.1}
BATCHES = [batch[0] for batch in batches(replace(CASES["element"], steps=9))]


def factors_for(mask: Mask, seed: int = 0) -> dict[str, Tensor]:
    """Uniform in [0, 1], some exactly 0 and 1, for every other parameter."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in list(mask)[::2]:
        drawn = torch.rand(len(mask.elements(name)), generator=generator)
        found[name] = torch.where(drawn < 0.2, 0.0, torch.where(drawn > 0.8, 1.0, drawn))
    return found


def train(
    scale: Any, case: str = "element", dtype: torch.dtype | None = None, steps: int = 9, **options: Any
) -> tuple:
    """The masked entries before and after some steps, the mask, and the moments."""
    plain = CASES[case].model()
    model = shard(plain if dtype is None else plain.to(dtype), "single")
    mask = Mask.random(model, 0.3, "element", seed=0, maskable="all")
    before = {name: model.module.get_parameter(name).detach().clone() for name in mask}
    scale = scale(mask) if callable(scale) else scale
    optimizer = MaskedAdamW(model, mask, scale=scale, **HYPER, **options)
    for ids in BATCHES[:steps]:
        model.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
    after = {name: model.module.get_parameter(name).detach() for name in mask}
    return before, after, mask, optimizer


@pytest.mark.usefixtures("torch_kernels")
def test_equals_dense_adamw_with_a_rate_for_each_entry() -> None:
    """float64, to 1e-12: the formula by hand on whole tensors, where entries outside the mask have rate 0."""
    _, found, mask, _ = train(factors_for, dtype=torch.float64)
    scale = factors_for(mask)
    model = CASES["element"].model().double()
    rates, moments = {}, {}
    for name in mask:
        rate = torch.zeros(mask.layouts[name].numel, dtype=torch.float64)
        rate[mask.elements(name)] = scale.get(name, torch.ones(1)).double() * HYPER["lr"]
        rates[name] = rate.view(mask.layouts[name].shape)
        moments[name] = [torch.zeros_like(rates[name]) for _ in range(2)]
    first, second = HYPER["betas"]
    for step, ids in enumerate(BATCHES, start=1):
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        with torch.no_grad():
            for name in mask:
                weight, (m, v) = model.get_parameter(name), moments[name]
                m.mul_(first).add_(weight.grad, alpha=1 - first)
                v.mul_(second).addcmul_(weight.grad, weight.grad, value=1 - second)
                weight.mul_(1 - rates[name] * HYPER["weight_decay"])
                denom = (v / (1 - second**step)).sqrt() + 1e-8
                weight.sub_(rates[name] * (m / (1 - first**step)) / denom)
    for name in mask:
        torch.testing.assert_close(found[name], model.get_parameter(name).detach(), rtol=0, atol=1e-12)


OPTIONS = [
    ("element", {}),
    ("bf16", {}),
    ("bf16", {"master": False}),
    ("bf16", {"master": False, "state_dtype": "8bit"}),
    ("bf16", {"state_dtype": "8bit", "offload": "cpu"}),
    ("bf16", {"master": False, "state_dtype": "bfloat16", "offload": "cpu"}),
]


@pytest.mark.parametrize(("case", "options"), OPTIONS)
def test_a_factor_of_one_gives_the_same_bits(case: str, options: dict) -> None:
    """A rate that is a little lower for one entry of each tensor leaves the bits of the first step of all others alone."""
    _, plain, mask, _ = train(None, case, steps=1, **options)
    scale = {name: torch.ones(len(mask.elements(name))) for name in mask}
    for factors in scale.values():
        factors[0] = 0.0
    before, found, _, optimizer = train(scale, case, steps=1, **options)
    assert len(optimizer.model_states()["factors"]) == len(mask.units)
    for name in mask:
        slow = mask.elements(name)[0]
        assert found[name].flatten()[slow] == before[name].flatten()[slow]
        expected = plain[name].flatten().clone()
        expected[slow] = before[name].flatten()[slow]
        assert torch.equal(found[name].flatten(), expected), name


@pytest.mark.parametrize(("case", "options"), OPTIONS)
def test_all_states_move_less_where_the_factor_is_small(case: str, options: dict) -> None:
    def tenth(mask: Mask) -> dict[str, Tensor]:
        return {name: torch.full((len(mask.elements(name)),), 0.1) for name in mask}

    before, plain, mask, _ = train(None, case, **options)
    _, slow, _, _ = train(tenth, case, **options)
    far, near = (
        sum(float((after[name].double() - before[name].double()).abs().sum()) for name in mask)
        for after in (plain, slow)
    )
    assert 0.05 * far < near < 0.3 * far


def test_ones_are_not_kept() -> None:
    _, plain, mask, _ = train(None)
    _, found, _, optimizer = train({name: torch.ones(len(mask.elements(name))) for name in mask})
    assert "factors" not in optimizer.model_states()
    assert all(torch.equal(found[name], plain[name]) for name in mask)


def test_each_rank_takes_its_part() -> None:
    """Three ranks with 5, 0 and the remaining entries of a parameter."""
    *_, optimizer = train(None)
    support = optimizer.supports[0]
    scale = torch.rand(support.num_entries)
    cuts = [5, 0, support.num_entries - 5]
    parts = []
    for rank, count in enumerate(cuts):
        runs = type(support.runs).whole(torch.arange(count, dtype=torch.int32), 1, support.num_entries)
        mine = replace(support, splits=cuts, rank=rank, runs=runs)
        parts.append(
            own_factors({support.name: scale}, [mine], torch.device("cpu")).get(support.name, scale[:0])
        )
    assert torch.equal(torch.cat(parts), scale)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (lambda mask: {next(iter(mask)): torch.ones(3)}, r"has \[3\] factors and \d+ masked entries"),
        (lambda mask: {"absent": torch.ones(1)}, "'absent' has"),
        (lambda mask: {n: torch.full((len(mask.elements(n)),), 1.5) for n in mask}, r"lies outside \[0, 1\]"),
        (
            lambda mask: {n: torch.full((len(mask.elements(n)),), torch.nan) for n in mask},
            r"outside \[0, 1\]",
        ),
    ],
)
def test_factors_that_do_not_fit(scale: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(scale)
