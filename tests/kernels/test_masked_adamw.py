"""Masked AdamW against torch.optim.AdamW and the formula, and ways masked training went wrong elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from trace_kernels import Runs, masked_adamw
from trace_kernels.dispatch import Impl
from trace_kernels.masked_adamw import masked_adamw_ref
from trace_kernels.rounding import stochastic_bf16

HYPER = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


def zeros(runs: Runs, count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return list(torch.zeros(count, runs.num_entries, dtype=dtype, device=runs.units.device).unbind())


def torch_adamw(weight: Tensor) -> torch.optim.AdamW:
    betas = (HYPER["beta1"], HYPER["beta2"])
    kwargs = {"lr": HYPER["lr"], "betas": betas, "eps": HYPER["eps"], "weight_decay": HYPER["weight_decay"]}
    return torch.optim.AdamW([weight], foreach=False, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_master", [True, False])
@pytest.mark.parametrize("block", [1, 64])
def test_full_density_equals_torch_bit_for_bit(dtype: torch.dtype, with_master: bool, block: int) -> None:
    numel = 64 * 2001
    runs = Runs.clip(torch.arange(numel // block), block, 0, numel, numel)
    weight = torch.randn(numel, dtype=dtype)
    theirs = torch.nn.Parameter(weight.clone())
    optimizer = torch_adamw(theirs)
    master = weight.clone() if with_master else None
    exp_avg, exp_avg_sq = zeros(runs, 2, dtype)
    for step in range(1, 26):
        theirs.grad = torch.randn(numel, dtype=dtype)
        optimizer.step()
        options = {"step": step, "impl": "torch"}
        masked_adamw(weight, runs, master, theirs.grad, exp_avg, exp_avg_sq, **HYPER, **options)
        assert torch.equal(weight, theirs)
    assert torch.equal(exp_avg, optimizer.state[theirs]["exp_avg"])
    assert torch.equal(exp_avg_sq, optimizer.state[theirs]["exp_avg_sq"])


@pytest.mark.parametrize("with_master", [True, False])
def test_equals_dense_float64_with_the_rest_restored(runs: Runs, with_master: bool) -> None:
    device = runs.units.device
    weight = torch.randn(runs.numel, dtype=torch.float64, device=device)
    theirs = torch.nn.Parameter(weight.clone())
    optimizer = torch_adamw(theirs)
    chosen = torch.zeros(runs.numel, dtype=torch.bool, device=device)
    chosen[runs.indices()] = True
    master = weight[runs.indices()] if with_master else None
    exp_avg, exp_avg_sq = zeros(runs, 2, torch.float64)
    for step in range(1, 6):
        theirs.grad = torch.randn(runs.numel, dtype=torch.float64, device=device)
        before = theirs.detach().clone()
        optimizer.step()
        with torch.no_grad():
            theirs[~chosen] = before[~chosen]
        grad = theirs.grad[runs.indices()]
        masked_adamw(weight, runs, master, grad, exp_avg, exp_avg_sq, **HYPER, step=step)
    torch.testing.assert_close(weight, theirs.detach(), rtol=0, atol=1e-12)


def test_adds_the_squares_of_the_unscaled_gradient(runs: Runs, impl: Impl, device: str) -> None:
    weight, grad = torch.randn(runs.numel, device=device), torch.randn(runs.num_entries, device=device)
    moments = zeros(runs, 2)
    squares = torch.tensor(3.0, dtype=torch.float64, device=device)
    options = {"step": 1, "grad_scale": 0.5, "squares": squares, "impl": impl}
    masked_adamw(weight, runs, None, grad, *moments, **HYPER, **options)
    torch.testing.assert_close(squares, 3 + grad.double().square().sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [torch.zeros(1, dtype=torch.float64), torch.zeros(())])
def test_refuses_squares_it_cannot_add_to(bad: Tensor) -> None:
    runs = Runs.random(40, 1, 0.5)
    with pytest.raises(ValueError, match="must be a 0-dim float64"):
        masked_adamw(torch.zeros(40), runs, None, *zeros(runs, 3), **HYPER, step=1, squares=bad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_equals_the_reference(runs: Runs, impl: Impl, device: str, dtype: torch.dtype) -> None:
    weight = torch.randn(runs.numel, device=device).to(dtype)
    ours = [weight.clone(), weight[runs.indices()].float(), *zeros(runs, 2)]
    theirs = [tensor.clone() for tensor in ours]
    for step in range(1, 4):
        grad = torch.randn(runs.num_entries, device=device)
        scale = torch.tensor(0.37, dtype=torch.float64, device=device) if step == 2 else 0.21
        for (w, p, m, v), update, extra in (
            (ours, masked_adamw, {"impl": impl}),
            (theirs, masked_adamw_ref, {}),
        ):
            update(w, runs, p, grad, m, v, **HYPER, step=step, grad_scale=scale, **extra)
    for mine, expected in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(mine, expected, rtol=2e-6, atol=1e-8)
    assert torch.equal(ours[0][runs.indices()], ours[1].to(dtype))
    frozen = torch.ones(runs.numel, dtype=torch.bool, device=device)
    frozen[runs.indices()] = False
    assert torch.equal(ours[0][frozen], weight[frozen])


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_every_path_rounds_alike(runs: Runs, impl: Impl, device: str, rounding: str) -> None:
    """Moments equal bit for bit, masters to 2 ulp; each weight is its master rounded as torch would, on a CPU."""
    weight = torch.randn(runs.numel, device=device).bfloat16()
    start = [weight, weight[runs.indices()].float(), *zeros(runs, 2)]
    one, other = [tensor.clone() for tensor in start], [tensor.cpu().clone() for tensor in start]
    ages = torch.randint(1, 4000, (runs.num_entries,), dtype=torch.int32)
    for step in (1, 2, ages):
        grad = torch.randn(runs.num_entries)
        for (w, p, m, v), path in ((one, impl), (other, "torch")):
            options = {"rounding": rounding, "seed": 5, "impl": path}
            mine = step.to(w.device) if isinstance(step, Tensor) else step
            masked_adamw(w, runs.to(w.device), p, grad.to(w.device), m, v, **HYPER, step=mine, **options)
    one, runs = [tensor.cpu() for tensor in one], runs.to("cpu")
    # near zero an entry keeps the rounding of the larger terms that it is the difference of
    torch.testing.assert_close(one[1], other[1], rtol=2.4e-7, atol=2e-8)
    assert torch.equal(one[2], other[2])
    assert torch.equal(one[3], other[3])
    for w, p, _, _ in (one, other):
        entries = runs.indices()
        rounded = p.bfloat16() if rounding == "nearest" else stochastic_bf16(p, entries + runs.base, seed=5)
        assert torch.equal(w[entries], rounded)


@pytest.mark.parametrize("block", [1, 64])
def test_frozen_entries_keep_their_bits_over_50_steps(
    impl: Impl, device: str, block: int, build_runs
) -> None:
    runs = build_runs((block, 4096, 100, 4000), "some", device)
    weight = torch.randn(runs.numel, device=device).bfloat16()
    start = weight.clone()
    exp_avg, exp_avg_sq = zeros(runs, 2)
    master = weight[runs.indices()].float()
    for step in range(1, 51):
        grad = torch.randn(runs.num_entries, device=device) if step < 25 else torch.zeros_like(master)
        masked_adamw(weight, runs, master, grad, exp_avg, exp_avg_sq, **HYPER, step=step, impl=impl)
    changed = weight.view(torch.int16) != start.view(torch.int16)
    support = torch.zeros_like(changed)
    support[runs.indices()] = True
    assert not bool(changed[~support].any())
    assert bool(changed[support].float().mean() > 0.9)


def test_ages_full_of_t_equal_the_number_t(impl: Impl, device: str, build_runs) -> None:
    runs = build_runs((64, 8192, 37, 6001), "some", device)
    for step in (1, 7, 1000, 10**6):
        weight = torch.randn(runs.numel, device=device)
        one = [weight, *zeros(runs, 2)]
        other = [tensor.clone() for tensor in one]
        grad = torch.randn(runs.num_entries, device=device)
        for (w, m, v), age in ((one, step), (other, torch.full_like(grad, step, dtype=torch.int32))):
            masked_adamw(w, runs, None, grad, m, v, **HYPER, step=age, impl=impl)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_late_entries_get_their_own_bias_correction(impl: Impl, device: str) -> None:
    """An entry's first step moves it by lr however old the run; with the global counter, far less."""
    runs = Runs.clip(torch.arange(2, device=device), 1, 0, 2, 2)
    weight, moments = torch.zeros(2, device=device), zeros(runs, 2)
    hyper = {**HYPER, "weight_decay": 0.0}
    ages = torch.tensor([1, 3], dtype=torch.int32, device=device)
    masked_adamw(weight, runs, None, torch.ones(2, device=device), *moments, **hyper, step=ages, impl=impl)
    assert weight[0].item() == pytest.approx(-HYPER["lr"], rel=1e-5)
    assert abs(weight[1].item()) < 0.7 * HYPER["lr"]


def test_bf16_moments_follow_fp32_moments(impl: Impl, device: str, build_runs) -> None:
    runs = build_runs((16, 4096, 0, 4096), "some", device)
    masters, moments = [], []
    for dtype, path in ((torch.float32, impl), (torch.bfloat16, impl), (torch.bfloat16, "torch")):
        torch.manual_seed(1)
        weight = torch.zeros(runs.numel, device=device).bfloat16()
        master = weight[runs.indices()].float()
        exp_avg, exp_avg_sq = zeros(runs, 2, dtype)
        for step in range(1, 11):
            grad = torch.randn(runs.num_entries, device=device)
            masked_adamw(weight, runs, master, grad, exp_avg, exp_avg_sq, **HYPER, step=step, impl=path)
        masters.append(master)
        moments.append((exp_avg, exp_avg_sq))
    torch.testing.assert_close(*moments[1:], rtol=0, atol=0)
    torch.testing.assert_close(*masters[:2], rtol=0.05, atol=0.05 * HYPER["lr"])
    assert not torch.equal(*masters[:2])


def test_a_bf16_second_moment_grows_and_falls_as_in_float64() -> None:
    """1000 steps of a gradient of 1, then 1000 of 0.01: to nearest it would end its growth near 0.25 and stay there."""
    numel, second = 2048, 0.0
    runs = Runs.clip(torch.arange(numel), 1, 0, numel, numel)
    weight, moments = torch.zeros(numel), zeros(runs, 2, torch.bfloat16)
    for step in range(1, 2001):
        grad = 1.0 if step <= 1000 else 0.01
        second = HYPER["beta2"] * second + (1 - HYPER["beta2"]) * grad**2
        options = {"step": step, "seed": step}
        masked_adamw(weight, runs, None, torch.full((numel,), grad), *moments, **HYPER, **options)
        if step in (1000, 2000):
            found = moments[1].double()
            assert found.mean().item() == pytest.approx(second, rel=0.02)
            assert found.std().item() < 0.1 * second


def test_a_bf16_weight_without_a_master_still_moves() -> None:
    """1000 steps of 1e-5 on 0.5: rounding to nearest loses them all, stochastic rounding keeps their mean."""
    numel = 512
    runs = Runs.clip(torch.arange(numel), 1, 0, numel, numel)
    hyper = {"lr": 1e-5, "beta1": 0.0, "beta2": 0.0, "eps": 1e-8, "weight_decay": 0.0}
    grad = -torch.ones(numel)
    lost = torch.full((numel,), 0.5).bfloat16()
    weight, moments = lost.clone(), zeros(runs, 2)
    for step in range(1, 1001):
        lost += 1e-5
        options = {"step": step, "rounding": "stochastic", "seed": step}
        masked_adamw(weight, runs, None, grad, *moments, **hyper, **options)
    assert bool((lost == 0.5).all())
    assert weight.float().mean().item() == pytest.approx(0.51, abs=5e-4)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"lr": -1.0}, "lr = -1.0"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"beta2": 1.0}, "beta2 = 1.0"),
        ({"step": 0}, "step = 0"),
        ({"step": torch.ones(8)}, "step: dtype"),
        ({"grad_scale": torch.ones(8)}, "grad_scale: shape"),
        ({"master": None}, "pass an fp32 master"),
        ({"rounding": "up"}, "rounding = 'up'"),
        ({"exp_avg": torch.zeros(7)}, "exp_avg: shape"),
        ({"weight": torch.zeros(8, dtype=torch.float16), "rounding": "stochastic"}, "needs a bf16 weight"),
        ({"weight": torch.zeros(8, dtype=torch.float64)}, "exp_avg: dtype"),
        ({"beta2": 1 - 1e-9, "step": torch.ones(8, dtype=torch.int32)}, r"at most 0\.99999"),
        ({"impl": "cuda"}, "impl = 'cuda'"),
    ],
)
def test_refuses(change: dict, match: str) -> None:
    names = ("master", "grad", "exp_avg", "exp_avg_sq")
    operands = {"weight": torch.zeros(8).bfloat16(), **{name: torch.zeros(8) for name in names}}
    with pytest.raises(ValueError, match=match):
        masked_adamw(
            **{**operands, "runs": Runs.clip(torch.arange(8), 1, 0, 8, 8), **HYPER, "step": 1, **change}
        )
