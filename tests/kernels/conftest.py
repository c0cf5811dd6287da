"""Fixtures of the kernel tests.

Each op is tested on every path that can run in this process: torch always; Triton on a GPU if there is one,
or under the interpreter if TRITON_INTERPRET=1, which `test_interpreter.py` sets in a process of its own.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
import torch
from trace_kernels import Runs
from trace_kernels.dispatch import Impl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PATHS = ["torch"] if not INTERPRETED else []
if INTERPRETED or torch.cuda.is_available():
    PATHS.append("triton")
if INTERPRETED:
    from kernels.patching import patch_once_per_launch

    patch_once_per_launch()

# block, shape_numel, start, stop: views that cut units at both edges, at none, and inside one unit
VIEWS = [
    (1, 1000, 0, 1000),
    (1, 5000, 777, 4321),
    (3, 999, 100, 800),
    (16, 4096, 0, 4096),
    (16, 4096, 1000, 3000),
    (64, 4096, 64, 4096 - 8),
    (64, 8192, 37, 3001),
    (576, 576 * 8, 300, 576 * 7 + 5),
    (1536, 1536 * 4, 1536, 1536 * 3),
    (5000, 5000, 1203, 4001),
    (1, 2**31 + 50_000, 2**31 - 1300, 2**31 + 1300),
    (64, 2**34, 2**33 + 37, 2**33 + 6000),
    (2**12, 2**34, 2**33 + 1000, 2**33 + 2**12 + 1000),
]
RUNS = [(view, "some") for view in VIEWS]
RUNS += [(view, density) for view in (VIEWS[1], VIEWS[6]) for density in ("empty", "one")]
RUNS += [(view, "full") for view in VIEWS[::2]]


@pytest.fixture(params=PATHS)
def impl(request: pytest.FixtureRequest) -> Impl:
    return request.param


@pytest.fixture
def device(impl: Impl) -> str:
    return "cuda" if impl == "triton" and not INTERPRETED else "cpu"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def make_runs(view: tuple[int, int, int, int], density: str, device: str = "cpu") -> Runs:
    """A support in ``view``; units around the view are masked too, so that clipping has something to do."""
    block, shape_numel, start, stop = view
    low, high = max(0, start // block - 3), min(shape_numel // block, stop // block + 3)
    num_units = {"empty": 0, "one": 1, "some": (high - low + 1) // 2, "full": high - low}[density]
    chosen = sorted(random.Random(0).sample(range(low, high), num_units))
    if density == "one":
        chosen = [(start + stop) // 2 // block]
    fits = shape_numel // block < 2**31
    units = torch.tensor(chosen, dtype=torch.int32 if fits else torch.int64, device=device)
    return Runs.clip(units, block, start, stop, shape_numel)


@pytest.fixture(params=RUNS, ids=lambda p: f"block{p[0][0]}-{p[0][2]}-{p[0][3]}-{p[1]}")
def runs(request: pytest.FixtureRequest, device: str) -> Runs:
    return make_runs(*request.param, device)


@pytest.fixture
def build_runs() -> Callable[..., Runs]:
    return make_runs


@pytest.fixture
def poisoned(device: str) -> Callable[..., torch.Tensor]:
    """Output buffers full of NaN, so that an entry left unwritten shows."""
    return lambda *shape, dtype=torch.float32: torch.full(shape, float("nan"), dtype=dtype, device=device)
