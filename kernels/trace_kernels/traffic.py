"""Memory traffic of one launch, modelled from the kernels' access pattern: ``python -m trace_kernels.traffic``.

    ratio = sectors that the programs touch, summed over programs / sectors that the operands hold, each once

A GPU moves memory in sectors of 32 bytes, so the ratio says how many bytes a launch moves for each byte it must.
The model walks the very tiles of `plan` and repeats `locate` for all programs at once. What counts:

- an operand's sector once for each program and access: the warps of a program share an L1 cache, and the L2
  cache merges their writes; a sector that two programs touch counts twice;
- a sector of unit ids once for each program and warp: the warps of a 1-D tile read the ids of their own
  entries, those of a 2-D tile, whatever its layout, at most all ids of the tile;
- lanes masked off: nothing. The maps of the 8-bit moments, a few KiB that every program reads, stay in L1.

Tensors begin on a sector boundary, as those of torch's allocators do.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .blockwise import BLOCK_SIZE
from .dispatch import NUM_THREADS, TILE, plan
from .masked_adamw_8bit import TILE as TILE_8BIT
from .runs import Runs

SECTOR = 32
"""Bytes that memory moves at a time."""
_WARP = 32


class Tiles(NamedTuple):
    """What `locate` yields for every program of a launch, each [num_programs, entries of a tile]."""

    local: Tensor
    position: Tensor
    unit: Tensor
    """Index of the entry's unit in ``runs.units``."""
    valid: Tensor
    reads_unit: Tensor
    """Where the load of the unit id is not masked off."""
    id_groups: tuple[int, int]
    """Consecutive entries whose ids a warp reads, and how many warps read them."""


class Access(NamedTuple):
    """Loads and stores of one kind."""

    operand: Literal["local", "position", "scale"]
    """Indexed by the local index, the compact position, or the block of 256 compact positions."""
    num_bytes: int
    """Per element."""
    times: int


OPS = ("compact_gather", "compact_scatter", "masked_adamw", "masked_adamw_8bit", "delta_swap")


def accesses(op: str, dtype: torch.dtype) -> list[Access]:
    """What one launch loads and stores beside the unit ids.

    Args:
        op: of `OPS`; the AdamW steps with a master copy.
        dtype: of the local slice; compact tensors are fp32, those of a delta swap of ``dtype``.
    """
    size = dtype.itemsize
    of = {
        "compact_gather": [Access("local", size, 1), Access("position", 4, 1)],
        "compact_scatter": [Access("local", size, 1), Access("position", 4, 1)],
        "masked_adamw": [Access("local", size, 1), Access("position", 4, 7)],
        "masked_adamw_8bit": [
            Access("local", size, 1),
            Access("position", 4, 3),
            Access("position", 1, 4),
            Access("scale", 4, 4),
        ],
        "delta_swap": [Access("local", size, 2), Access("position", size, 2)],
    }
    if op not in of:
        raise ValueError(f"op = {op!r}: must be one of {', '.join(OPS)}")
    return of[op]


def moved_bytes(op: str, runs: Runs, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that one launch moves, and the least that it could: each sector of each access once."""
    tiles = _tiles_1d(runs, TILE_8BIT) if op == "masked_adamw_8bit" else tiles_of(runs)
    indices = {
        "local": (tiles.local, runs.indices()),
        "position": (tiles.position, torch.arange(runs.num_entries)),
        "scale": (tiles.position // BLOCK_SIZE, torch.arange(runs.num_entries) // BLOCK_SIZE),
    }
    entries, warps = tiles.id_groups
    unit, reads_unit = (tensor.reshape(-1, entries) for tensor in (tiles.unit, tiles.reads_unit))
    moved = warps * num_sectors(unit, reads_unit, runs.units.element_size())
    least = -(-runs.units.nbytes // SECTOR)
    for operand, num_bytes, times in accesses(op, dtype):
        per_program, once = indices[operand]
        moved += times * num_sectors(per_program, tiles.valid, num_bytes)
        least += times * num_sectors(once[None], torch.ones_like(once[None], dtype=torch.bool), num_bytes)
    return SECTOR * moved, SECTOR * least


def gap_gather_bytes(words: Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that one launch of `gap_gather` moves, and the least that it could, as of `moved_bytes`.

    A program reads its words and the pair of sums at its start, and what its words lead to; it writes one stretch.

    Args:
        words: [num_words] uint8, int16 or int32 gaps.
        dtype: of the values.
    """
    num_programs = -(-words.numel() // TILE)
    at = torch.arange(num_programs * TILE).view(num_programs, TILE)
    padded = torch.nn.functional.pad(words, (0, at.numel() - words.numel())).view_as(at)
    valid = at < words.numel()
    ends = valid & (padded != torch.iinfo(words.dtype).max)
    index = padded.view(-1).cumsum(0, dtype=torch.int64).view_as(at)
    place = ends.view(-1).cumsum(0).view_as(at) - 1
    starts = torch.arange(2 * num_programs).view(num_programs, 2)
    accesses = [(at, valid, words.itemsize), (starts, torch.ones_like(starts, dtype=torch.bool), 8)]
    accesses += [(index, ends, dtype.itemsize), (place, ends, 4)]
    moved = sum(num_sectors(where, read, size) for where, read, size in accesses)
    least = sum(num_sectors(where[read][None], read[read][None], size) for where, read, size in accesses)
    return SECTOR * moved, SECTOR * least


def modelled_ratio(op: str, runs: Runs, dtype: torch.dtype) -> float:
    """Bytes moved over the least possible; 1 where nothing is masked."""
    moved, least = moved_bytes(op, runs, dtype)
    return moved / least if least else 1.0


def tiles_of(runs: Runs) -> Tiles:
    """`locate` for every program of `plan`."""
    num_programs, constexprs = plan(runs)
    if constexprs["LANES"] == 0:
        return _tiles_1d(runs, constexprs["UNITS"])
    return _tiles_2d(runs, num_programs, constexprs["UNITS"], constexprs["LANES"])


def num_sectors(index: Tensor, valid: Tensor, num_bytes: int) -> int:
    """Distinct sectors in each row of ``index`` [rows, n], summed; rising in a row where ``valid``."""
    if index.numel() == 0:
        return 0
    sector = (index * num_bytes // SECTOR).masked_fill(~valid, -1).cummax(dim=1).values
    return int((sector[:, 0] >= 0).sum() + (sector[:, 1:] != sector[:, :-1]).sum())


def _tiles_1d(runs: Runs, tile: int) -> Tiles:
    position = torch.arange(-(-runs.num_entries // tile) * tile).view(-1, tile)
    valid = position < runs.num_entries
    q = position + runs.skip
    unit = (q // runs.block).clamp(max=runs.num_units - 1)
    local = runs.units.long()[unit] * runs.block + q % runs.block - runs.base
    # A thread handles 4 at a time.
    return Tiles(local, position, unit, valid, valid, id_groups=(4 * _WARP, 1))


def _tiles_2d(runs: Runs, num_programs: int, units: int, lanes: int) -> Tiles:
    num_strips = -(-runs.block // lanes)
    program = torch.arange(num_programs)[:, None, None]
    index = program // num_strips * units + torch.arange(units)[:, None]
    lane = program % num_strips * lanes + torch.arange(lanes)
    in_range = index < runs.num_units
    unit = index.clamp(max=runs.num_units - 1)
    unit_position = index * runs.block - runs.skip
    local = runs.units.long()[unit] * runs.block - runs.base + lane
    position = unit_position + lane
    inside = (lane >= -unit_position) & (lane < (runs.num_entries - unit_position).clamp(max=runs.block))
    shape = (num_programs, units * lanes)
    local, position, unit, valid, reads_unit = (
        tensor.expand(num_programs, units, lanes).reshape(shape)
        for tensor in (local, position, unit, in_range & inside, in_range)
    )
    return Tiles(local, position, unit, valid, reads_unit, id_groups=(units * lanes, NUM_THREADS // _WARP))


def example_runs(density: float = 0.05, numel: int = 1 << 20) -> Iterator[tuple[str, Runs]]:
    """Supports of every granularity, and one of each kind inside a view that a ZeRO-3 cut leaves unaligned."""
    for name, block in (
        ("element", 1),
        ("block 16", 16),
        ("block 32", 32),
        ("block 64", 64),
        ("block 128", 128),
        ("row 1024", 1024),
        ("row 576", 576),
    ):
        numel_in_units = numel // block * block
        whole = Runs.random(numel_in_units, block, density)
        yield name, whole
        if block > 1:
            start, stop = numel_in_units // 3 | 1, 2 * numel_in_units // 3 | 1
            yield f"{name}, cut", Runs.clip(whole.units, block, start, stop, numel_in_units)


def main() -> None:
    """Prints a line for each op, support and dtype."""
    parser = argparse.ArgumentParser(description="Model the bytes that each kernel moves.")
    parser.add_argument("--density", type=float, default=0.05, help="masked share, in (0, 1]")
    density = parser.parse_args().density
    print(f"{'op':<20}{'support':<16}{'dtype':<10}{'KiB':>10}{'least KiB':>11}{'ratio':>7}")
    for op in OPS:
        for name, runs in example_runs(density):
            for dtype in (torch.bfloat16, torch.float32):
                moved, least = moved_bytes(op, runs, dtype)
                sizes = f"{moved / 1024:>10.1f}{least / 1024:>11.1f}{modelled_ratio(op, runs, dtype):>7.3f}"
                print(f"{op:<20}{name:<16}{str(dtype).removeprefix('torch.'):<10}{sizes}")


if __name__ == "__main__":
    main()
