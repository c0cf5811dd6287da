"""The C++ path against the torch path and the Triton kernels, and what happens where it cannot be built."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from pathlib import Path

import pytest
import torch
from torch import Tensor
from trace_kernels import (
    DeltaSwapBatch,
    Runs,
    compact_gather,
    compact_gather_sumsq,
    compact_scatter,
    compact_sumsq,
    cpu,
    delta_swap,
    masked_adamw,
)
from trace_kernels.dispatch import Impl, choose

HYPER = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def _needs_a_compiler(request: pytest.FixtureRequest, device: str) -> None:
    if "library_folder" not in request.fixturenames and (cpu.library() is None or device != "cpu"):
        pytest.skip("no C++ path here")
    if os.environ.get("TRITON_INTERPRET") == "1" and "impl" not in signature(request.function).parameters:
        pytest.skip("calls no kernel of Triton")


@pytest.fixture
def library_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache in which the library is looked for afresh."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("TRACE_KERNELS_CPU", raising=False)
    cpu.library.cache_clear()
    yield tmp_path / "trace_kernels"
    cpu.library.cache_clear()


@pytest.fixture
def two_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def same_bits(one: Tensor, other: Tensor) -> bool:
    word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.view(word), other.view(word))


def state_of(runs: Runs, weight: Tensor, with_master: bool, moments: torch.dtype) -> list[Tensor | None]:
    """weight, master, exp_avg, exp_avg_sq."""
    master = weight[runs.indices()].float() if with_master else None
    return [weight.clone(), master, *torch.zeros(2, runs.num_entries, dtype=moments).unbind()]


def step(state: list[Tensor | None], runs: Runs, grad: Tensor, **options: object) -> None:
    weight, master, exp_avg, exp_avg_sq = state
    masked_adamw(weight, runs, master, grad, exp_avg, exp_avg_sq, **HYPER, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "with_master", "moments", "grad_dtype", "rounding"),
    [
        (torch.bfloat16, True, torch.float32, torch.float32, "nearest"),
        (torch.bfloat16, True, torch.bfloat16, torch.bfloat16, "stochastic"),
        (torch.bfloat16, False, torch.float32, torch.float32, "stochastic"),
        (torch.float32, True, torch.float32, torch.bfloat16, "nearest"),
        (torch.float32, False, torch.bfloat16, torch.float32, "nearest"),
    ],
)
def test_adamw_rounds_as_the_other_paths(
    runs: Runs,
    impl: Impl,
    dtype: torch.dtype,
    with_master: bool,
    moments: torch.dtype,
    grad_dtype: torch.dtype,
    rounding: str,
) -> None:
    """Triton: every bit. Torch: the moments' bits, and weights to 2 ulp, for its square root is not correctly rounded."""
    weight = torch.randn(runs.numel).to(dtype)
    one, other = (state_of(runs, weight, with_master, moments) for _ in range(2))
    ages = torch.randint(1, 40_000, (runs.num_entries,), dtype=torch.int32)
    for t, scale in ((1, 1.0), (2, torch.tensor(0.37)), (ages, 0.21)):
        grad = torch.randn(runs.num_entries).to(grad_dtype)
        options = {"step": t, "grad_scale": scale, "rounding": rounding, "seed": 5}
        if not with_master and impl == "torch":  # what it reads again next time must be alike
            one[0] = other[0].clone()  # type: ignore[union-attr]
        step(one, runs, grad, impl="cpp", **options)
        step(other, runs, grad, impl=impl, **options)
        assert all(same_bits(a, b) for a, b in zip(one[2:], other[2:], strict=True))  # type: ignore[arg-type]
    changed, expected = one[1 if with_master else 0], other[1 if with_master else 0]
    assert changed is not None
    assert expected is not None
    if impl == "triton":
        assert same_bits(changed, expected)
        assert same_bits(one[0], other[0])  # type: ignore[arg-type]
    elif changed.dtype == torch.float32:
        # near zero an entry keeps the rounding of the larger terms that it is the difference of
        torch.testing.assert_close(changed, expected, rtol=2.4e-7, atol=2e-8)
    else:
        assert (changed != expected).float().mean() < 1e-3
    frozen = torch.ones(runs.numel, dtype=torch.bool)
    frozen[runs.indices()] = False
    assert same_bits(one[0][frozen], weight[frozen])  # type: ignore[index]


def test_a_weight_is_its_master_rounded(runs: Runs) -> None:
    state = state_of(runs, torch.randn(runs.numel).bfloat16(), True, torch.float32)
    step(state, runs, torch.randn(runs.num_entries), step=1, impl="cpp")
    assert same_bits(state[0][runs.indices()], state[1].bfloat16())  # type: ignore[index, union-attr]


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_scatter_and_swap_have_the_bits_of_torch(runs: Runs, dtype: torch.dtype) -> None:
    src, values = torch.randn(runs.numel).to(dtype), torch.randn(runs.num_entries)
    for scale, accumulate in ((1.0, False), (0.3, False), (0.3, True)):
        options = {"scale": scale, "accumulate": accumulate}
        out, total = compact_gather_sumsq(src, runs, values.clone(), **options, impl="cpp")
        assert same_bits(out, compact_gather(src, runs, values.clone(), **options, impl="torch"))
        torch.testing.assert_close(total.double(), out.double().square().sum(), rtol=1e-7, atol=0)
    for compact in (values, values.bfloat16()):
        one, other = src.clone(), src.clone()
        compact_scatter(one, runs, compact, impl="cpp")
        compact_scatter(other, runs, compact, impl="torch")
        assert same_bits(one, other)
    one, other, mine = src.clone(), src.clone(), values.to(dtype)
    theirs = mine.clone()
    delta_swap(one, runs, mine, impl="cpp")
    delta_swap(other, runs, theirs, impl="torch")
    assert same_bits(one, other)
    assert same_bits(mine, theirs)


def test_bf16_rounding_edge_cases() -> None:
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00000001, -0x80000000, 0x7F800000, 0x7F800001])
    values = bits.int().view(torch.float32)
    dst = torch.zeros(values.numel(), dtype=torch.bfloat16)
    compact_scatter(dst, Runs.clip(torch.arange(7), 1, 0, 7, 7), values, impl="cpp")
    assert bool(dst[-1].isnan())
    assert same_bits(dst[:-1], values[:-1].bfloat16())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
@pytest.mark.parametrize("num_values", [0, 1, 255, 100_003])
def test_sumsq_is_that_of_float64(dtype: torch.dtype, num_values: int) -> None:
    values = torch.randn(num_values).to(dtype)
    for impl in ("auto", "torch"):
        total = compact_sumsq(values, impl=impl)
        assert total.dtype == torch.float64
        torch.testing.assert_close(total, values.double().square().sum(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("block", [1, 64, 1 << 19])
def test_threads_do_not_change_a_bit(block: int, two_threads: Callable[[int], None]) -> None:
    runs = Runs.random(1 << 19, block, 0.4 if block < 1000 else 1.0)
    src, grad = torch.randn(runs.numel), torch.randn(runs.num_entries)
    results = []
    for num_threads in (1, 2):
        two_threads(num_threads)
        state = state_of(runs, src, False, torch.float32)
        step(state, runs, grad, step=3, impl="cpp")
        gathered, total = compact_gather_sumsq(src, runs, scale=0.7, impl="cpp")
        results.append([state[0], *state[2:], gathered, total, compact_sumsq(grad, impl="cpp")])
    assert cpu._num_threads(runs.num_entries) == 2
    assert all(same_bits(one, other) for one, other in zip(*results, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("block", [1, 64])
def test_threads_swap_each_entry_once(
    block: int, two_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several parameters of many tiles are dealt out to both."""
    two_threads(2)
    monkeypatch.setattr(cpu, "_SWAPPED_PER_THREAD", 1)
    runs = [Runs.random(1 << 17, block, density, seed) for seed, density in enumerate((0.4, 0.01, 1.0))]
    weights, values = (
        [torch.randn(each.numel) for each in runs],
        [torch.randn(each.num_entries) for each in runs],
    )
    wanted = [(weight.clone(), mine.clone()) for weight, mine in zip(weights, values, strict=True)]
    DeltaSwapBatch(list(zip(weights, runs, values, strict=True))).run()
    for (weight, mine), each in zip(wanted, runs, strict=True):
        delta_swap(weight, each, mine, impl="torch")
    found = list(zip(weights, values, strict=True))
    assert all(
        torch.equal(one, two)
        for pair, other in zip(found, wanted, strict=True)
        for one, two in zip(pair, other, strict=True)
    )


def test_auto_takes_cpp_for_the_dtypes_it_has() -> None:
    assert choose("auto", torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)) == "cpp"
    assert choose("torch", torch.zeros(1)) == "torch"
    for dtype in (torch.float16, torch.float64):
        assert choose("auto", torch.zeros(1), torch.zeros(1, dtype=dtype)) == "torch"
        with pytest.raises(ValueError, match="needs fp32 and bf16 operands"):
            choose("cpp", torch.zeros(1, dtype=dtype))


def test_without_a_compiler_the_torch_path_runs_after_one_warning(
    library_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    runs, src = Runs.random(1000, 1, 0.5), torch.randn(1000)
    with pytest.warns(RuntimeWarning, match="no-such-compiler"):
        out = compact_gather(src, runs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = compact_gather(src, runs)
    expected = compact_gather(src, runs, impl="torch")
    assert same_bits(out, expected)
    assert same_bits(again, expected)
    with pytest.raises(ValueError, match="a C\\+\\+ compiler"):
        compact_gather(src, runs, impl="cpp")


def test_a_compiler_that_fails_says_why(library_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_FLAGS", [*cpu._FLAGS, "-fno-such-flag"])
    with pytest.warns(RuntimeWarning, match="fno-such-flag"):
        assert cpu.library() is None
    assert list(library_folder.iterdir()) == []


def test_a_user_without_a_home_has_the_torch_path(
    library_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a container does that runs under a number which no user has."""

    def unknown(number: int) -> None:
        raise KeyError(f"uid not found: {number}")

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.warns(RuntimeWarning, match="set HOME or TORCH_EXTENSIONS_DIR"):
        assert cpu.library() is None


def test_the_environment_can_ask_for_torch(library_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACE_KERNELS_CPU", "torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("auto", torch.zeros(1)) == "torch"
    assert not library_folder.exists()
    cpu.library.cache_clear()
    monkeypatch.setenv("TRACE_KERNELS_CPU", "fast")
    with pytest.raises(ValueError, match="TRACE_KERNELS_CPU='fast': must be 'auto' or 'torch'"):
        cpu.library()


def test_ranks_may_build_at_once(library_folder: Path) -> None:
    code = "import torch, trace_kernels.cpu as c; assert c.sumsq(torch.ones(5)) == 5; print(c._build())"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    def rank(_: int) -> str:
        run = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
        )
        assert run.returncode == 0, run.stderr
        return run.stdout

    with ThreadPoolExecutor(3) as pool:
        paths = set(pool.map(rank, range(3)))
    assert [str(path) + "\n" for path in library_folder.iterdir()] == list(paths)
