"""The traffic model: its tiles against the kernel's own, its counts against counts by hand, and its verdict."""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl
from trace_kernels import Runs, traffic
from trace_kernels.dispatch import Plan, locate, plan, run_args
from trace_kernels.traffic import OPS, example_runs, modelled_ratio, moved_bytes, tiles_of

SUPPORTS = dict(example_runs())
SECTOR = 32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("op", OPS)
def test_kernels_move_at_most_15_percent_more_than_they_must(op: str, dtype: torch.dtype) -> None:
    ratios = {name: modelled_ratio(op, runs, dtype) for name, runs in SUPPORTS.items()}
    print(op, dtype, {name: round(ratio, 3) for name, ratio in ratios.items()})
    assert all(1.0 <= ratio <= 1.15 for ratio in ratios.values()), ratios


def test_counts_two_units_by_hand() -> None:
    """bf16 values of 2 x 128 bytes, fp32 outputs of 512 bytes, and ids of 8 bytes that 4 warps read."""
    runs = Runs.clip(torch.tensor([0, 5], dtype=torch.int32), 64, 0, 640, 640)
    assert moved_bytes("compact_gather", runs, torch.bfloat16) == (
        (8 + 16 + 4) * SECTOR,
        (8 + 16 + 1) * SECTOR,
    )


def test_a_sector_that_two_programs_touch_counts_twice() -> None:
    """A row of 2048, cut after its first element: tiles end at elements 1022 and 2046 of the slice, both inside
    a sector of 16 bf16 and one of 8 fp32; 4 warps of 2 programs read the id."""
    runs = Runs.clip(torch.tensor([0], dtype=torch.int32), 2048, 1, 4096, 4096)
    least = 128 + 256 + 1
    assert moved_bytes("compact_gather", runs, torch.bfloat16) == ((least + 2 + 7) * SECTOR, least * SECTOR)


def test_counts_the_8_bit_step_by_hand() -> None:
    """513 entries in programs of 512: all sectors but those of ids and scales are touched by one program alone."""
    runs = Runs.clip(torch.arange(513, dtype=torch.int32), 1, 0, 513, 513)
    codes, floats, scales, ids = 4 * 17, 3 * 65 + 65, 4 * 1, 65
    moved, least = moved_bytes("masked_adamw_8bit", runs, torch.float32)
    assert least == (codes + floats + scales + ids) * SECTOR
    assert moved == least + 4 * SECTOR  # the second program reads and writes the sector of its scales again


def test_a_tile_too_small_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = {"UNITS": 1, "LANES": 16, "ALIGNED": True}
    monkeypatch.setattr(traffic, "plan", lambda runs: Plan(runs.num_units * 64, tile))
    assert modelled_ratio("compact_gather", SUPPORTS["row 1024"], torch.bfloat16) > 2


@pytest.mark.parametrize("op", OPS)
def test_an_empty_support_moves_nothing(op: str) -> None:
    for block in (1, 64):
        runs = Runs.clip(torch.arange(0), block, 0, 640, 640)
        assert moved_bytes(op, runs, torch.bfloat16) == (0, 0)
        assert modelled_ratio(op, runs, torch.bfloat16) == 1.0


def test_refuses_an_unknown_op() -> None:
    with pytest.raises(ValueError, match="op = 'swap': must be one of compact_gather"):
        modelled_ratio("swap", SUPPORTS["element"], torch.bfloat16)


@triton.jit
def _locate_kernel(  # type: ignore[no-untyped-def]
    local_ptr,
    position_ptr,
    valid_ptr,
    units_ptr,
    num_units,
    num_entries,
    block,
    base,
    skip,
    UNITS: tl.constexpr,
    LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    local, position, valid = locate(
        units_ptr, num_units, num_entries, block, base, skip, UNITS, LANES, ALIGNED
    )
    entry = tl.program_id(0) * local.numel + tl.reshape(tl.arange(0, local.numel), local.shape)
    tl.store(local_ptr + entry, local)
    tl.store(position_ptr + entry, position)
    tl.store(valid_ptr + entry, valid)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in the interpreter's process")
def test_the_tiles_are_those_of_triton(runs: Runs) -> None:
    if runs.num_entries == 0:
        return
    num_programs, tile = plan(runs)
    expected = tiles_of(runs)
    local, position, valid = (torch.full(expected.local.shape, -1) for _ in range(3))
    _locate_kernel[(num_programs,)](local, position, valid, *run_args(runs), **tile)
    assert torch.equal(valid.bool(), expected.valid)
    for mine, theirs in ((expected.local, local), (expected.position, position)):
        assert torch.equal(mine[expected.valid], theirs[expected.valid])
