"""One launch for many parameters has the bits of one launch for each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton as compiler
import triton.language as tl
from torch import Tensor
from trace_kernels import AdamWBatch, Runs, masked_adamw
from trace_kernels.dispatch import Impl
from trace_kernels.hyper import AdamWHyper
from trace_kernels.masked_adamw import Operands, Rounding
from trace_kernels.rounding import seed_keys, seed_keys_kernel

HYPER = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
VIEWS = [
    (1, 5000, 777, 4321),
    (64, 8192, 37, 3001),
    (64, 4096, 64, 4088),
    (16, 4096, 0, 4096),
    (1, 900, 0, 900),
]


@pytest.fixture
def path(impl: Impl) -> Impl:
    if impl != "triton":
        pytest.skip("a batch is what Triton launches")
    return impl


def operands(
    build_runs: Callable[..., Runs], device: str, dtype: torch.dtype, master: bool, moments: torch.dtype
) -> list[Operands]:
    """Parameters with units of several sizes, one of them without an entry."""
    made = []
    for number, (view, density) in enumerate([*((view, "some") for view in VIEWS), (VIEWS[1], "empty")]):
        torch.manual_seed(number)
        runs = build_runs(view, density, device)
        weight = torch.randn(runs.numel, device=device).to(dtype)
        full = weight[runs.indices()].float() if master else None
        m, v = torch.rand(2, runs.num_entries, device=device).mul(1e-3).to(moments).unbind()
        made.append(Operands(weight, runs, full, torch.randn(runs.num_entries, device=device), m, v))
    return made


def copied(states: list[Operands]) -> list[Operands]:
    def copy(value: Tensor | Runs | None) -> Tensor | Runs | None:
        return value.clone() if isinstance(value, Tensor) else value

    return [Operands(*map(copy, state)) for state in states]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "master", "moments", "rounding"),
    [
        (torch.float32, False, torch.float32, "nearest"),
        (torch.bfloat16, True, torch.float32, "nearest"),
        (torch.float16, True, torch.bfloat16, "nearest"),
        (torch.bfloat16, False, torch.bfloat16, "stochastic"),
    ],
)
@pytest.mark.parametrize("scale_on_device", [False, True])
def test_the_bits_are_those_of_single_steps(
    path: Impl,
    device: str,
    build_runs: Callable[..., Runs],
    dtype: torch.dtype,
    master: bool,
    moments: torch.dtype,
    rounding: Rounding,
    scale_on_device: bool,
) -> None:
    together = operands(build_runs, device, dtype, master, moments)
    alone = copied(together)
    seeds = [(number << 62) + 7 * number for number in range(len(together))]
    batch = AdamWBatch(together, seeds, rounding)
    assert 1 < batch.num_launches < len(together)
    scale = torch.tensor(0.37, device=device) if scale_on_device else 0.37
    for step in (1, 2):
        assert batch.holds(together)
        batch.step(AdamWHyper(**HYPER), step, scale)
        for state, seed in zip(alone, seeds, strict=True):
            options = {"step": step, "grad_scale": scale, "rounding": rounding, "seed": seed + step}
            masked_adamw(*state, **HYPER, **options, impl=path)  # type: ignore[arg-type]
    for one, other in zip(together, alone, strict=True):
        for name in ("weight", "master", "exp_avg", "exp_avg_sq"):
            mine, theirs = getattr(one, name), getattr(other, name)
            assert (mine is None and theirs is None) or torch.equal(mine, theirs), name


def test_parameters_of_one_kind_share_a_launch(
    path: Impl, device: str, build_runs: Callable[..., Runs]
) -> None:
    made = [operands(build_runs, device, torch.float32, False, torch.float32)[3] for _ in range(40)]
    assert AdamWBatch(made, range(40)).num_launches == 1


def test_notices_that_an_operand_has_moved(path: Impl, device: str, build_runs: Callable[..., Runs]) -> None:
    made = operands(build_runs, device, torch.float32, False, torch.float32)
    batch = AdamWBatch(made, range(len(made)))
    assert not batch.holds([made[0]._replace(weight=made[0].weight.clone()), *made[1:]])
    assert not batch.holds(made[1:])


def test_refuses_what_single_steps_refuse(path: Impl, device: str, build_runs: Callable[..., Runs]) -> None:
    (first, *_) = operands(build_runs, device, torch.float32, False, torch.float32)
    with pytest.raises(ValueError, match="grad: shape"):
        AdamWBatch([first._replace(grad=first.grad[1:])], [0])
    double = Operands(*(t.double() if isinstance(t, Tensor) else t for t in first))
    with pytest.raises(ValueError, match="no Triton path"):
        AdamWBatch([double], [0])


@compiler.jit
def keys_kernel(seed_ptr, out_ptr):  # type: ignore[no-untyped-def]
    one, two = seed_keys_kernel(tl.load(seed_ptr))
    tl.store(out_ptr, one.to(tl.int32, bitcast=True))
    tl.store(out_ptr + 1, two.to(tl.int32, bitcast=True))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 12345678901234567])
def test_keys_are_those_of_the_host(path: Impl, device: str, seed: int) -> None:
    found = torch.zeros(2, dtype=torch.int32, device=device)
    keys_kernel[(1,)](torch.tensor([seed], device=device), found)
    assert tuple(found.tolist()) == seed_keys(seed)
