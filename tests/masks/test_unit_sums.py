"""Sums over units: in one order on a GPU, with the same numbers as on a CPU."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from engine.meta_gpu import META, meta_gpu
from torch.utils._python_dispatch import TorchDispatchMode
from trace_kernels import unit_reduce

from trace_dist.masks.unit_sums import add_at, add_squares
from trace_dist.masks.units import UnitLayout

LAYOUTS = {
    "element": UnitLayout((6, 10), 1),
    "block": UnitLayout((6, 10), 5),
    "ragged": UnitLayout((6, 10), 4),
    "row": UnitLayout((6, 10), 10),
    "head": UnitLayout((6, 10), 20),
    "column": UnitLayout((6, 10), 6, 10),
}


class Scattered(TorchDispatchMode):
    """Whether each addition by index, in the block, was asked to be deterministic."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname in ("index_add_", "scatter_add_", "index_put_"):
            self.found.append(torch.are_deterministic_algorithms_enabled())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("start", "stop"), [(0, 60), (7, 33), (13, 14)])
def test_the_kernel_sums_what_the_cpu_sums(name: str, start: int, stop: int) -> None:
    layout, values = LAYOUTS[name], torch.arange(start, stop, dtype=torch.float32)
    near = layout.unit_range(start, stop)
    sums = torch.ones(len(near), dtype=torch.float64)
    add_squares(sums, layout, values, start, 0.5)
    squares = torch.zeros(layout.numel, dtype=torch.float64)
    squares[start:stop] = values.double().square()
    expected = [1 + 0.5 * float(squares[layout.elements(torch.tensor([unit]))].sum()) for unit in near]
    assert sums.tolist() == expected
    if not layout.scattered:
        first, found = unit_reduce.unit_sumsq(values, layout.unit, start)
        assert (first, len(found)) == (near.start, len(near))
        assert (1 + 0.5 * found.double()).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_nothing_is_added_by_atomics(name: str) -> None:
    layout = LAYOUTS[name]
    values = torch.empty(30, device=META)
    launched = []

    def launch(kernel: Any, *_: Any, **__: Any) -> None:
        launched.append(kernel)

    gpu = patch.object(unit_reduce, "use_triton", lambda impl, x, *_: x.is_meta)
    with meta_gpu(), gpu, patch.object(unit_reduce, "launch", launch), Scattered() as seen:
        sums = torch.zeros(len(layout.unit_range(7, 37)), device=META)
        add_squares(sums, layout, values, 7, 0.5)
        add_at(sums, torch.zeros(30, dtype=torch.int64, device=META), values)
    assert seen.found == [True] * (1 + layout.scattered)
    assert len(launched) == (not layout.scattered and layout.unit > 1)
    assert not torch.are_deterministic_algorithms_enabled()
