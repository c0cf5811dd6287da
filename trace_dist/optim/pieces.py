"""One rank's part of a parameter's masked entries, put together from what another number of ranks kept.

A rank's support is a contiguous slice of the mask's sorted entries, so each file (or part of a state dict) states one interval
[start, stop) per parameter, and any other partition reads the slices that it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trace_kernels.masked_adamw_8bit import BLOCK_SIZE, Blockwise, dequantize_blockwise

from trace_dist.optim.states import MOMENTS, SIGNED, State, is_quantized, set_moment
from trace_dist.sharding.support import Support


@dataclass(frozen=True)
class Piece:
    """Entries [first + low, first + high) of a support in one rank's file, whose own entries begin at ``first``."""

    file: Any
    name: str
    first: int
    length: int
    low: int
    high: int

    def read(self, part: str) -> Tensor:
        """The part's values, in full precision: [high - low], on the device where the file has them."""
        stored = self.file.get_slice(f"{self.name}/{part}")
        if f"{self.name}/{part}_absmax" not in self.file.keys():  # noqa: SIM118 - not a mapping
            return stored[self.low : self.high]
        block = self.low // BLOCK_SIZE
        scales = self.file.get_slice(f"{self.name}/{part}_absmax")[block : -(-self.high // BLOCK_SIZE)]
        codes = Blockwise(stored[block * BLOCK_SIZE : self.high], scales)
        return dequantize_blockwise(codes, signed=part == SIGNED)[self.low - block * BLOCK_SIZE :]


def pieces_of(support: Support, files: Sequence[tuple[Any, dict[str, list[int]]]]) -> list[Piece]:
    """Where a support's entries lie in files, given with their intervals; in rising order."""
    start, stop = support.offset, support.offset + support.runs.num_entries
    found = []
    for file, intervals in files:
        first, last = intervals.get(support.name, [0, 0])
        low, high = max(start, first), min(stop, last)
        if low < high:
            found.append(Piece(file, support.name, first, last - first, low - first, high - first))
    return sorted(found, key=lambda piece: piece.first)


def covers(support: Support, pieces: list[Piece]) -> bool:
    """Whether the pieces are the support's entries, each once."""
    expected = support.offset
    for piece in pieces:
        if piece.first + piece.low != expected:
            return False
        expected = piece.first + piece.high
    return expected == support.offset + support.runs.num_entries


def restore(
    entries: Sequence[tuple[Support, State]], found: dict[str, list[Piece]], steps: dict[str, int]
) -> list[Tensor]:
    """Set step counts and moments, and give the values: [support.runs.num_entries] each, for ``set_values``.

    Args:
        entries: the optimizer's supports and states.
        found: the pieces of each parameter, which cover its support.
        steps: step count of each parameter.
    """
    values = []
    for support, state in entries:
        pieces = found[support.name]
        state["step"] = steps[support.name]
        values.append(join(support, pieces, "values"))
        for moment in MOMENTS:
            if not _copy_exactly(support, state, moment, pieces):
                set_moment(state, moment, join(support, pieces, moment))
    return values


def join(support: Support, pieces: list[Piece], part: str) -> Tensor:
    """A part of this rank's entries out of the pieces that cover them: [support.runs.num_entries]."""
    return torch.cat([piece.read(part) for piece in pieces]) if pieces else support.grad.cpu()[:0]


def _copy_exactly(support: Support, state: State, moment: str, pieces: list[Piece]) -> bool:
    """Copy a moment as it is stored, codes and scales included; False where the partition or the kind differs."""
    if len(pieces) != 1 or pieces[0].length != support.runs.num_entries:
        return False
    quantized = f"{support.name}/{moment}_absmax" in pieces[0].file.keys()  # noqa: SIM118 - not a mapping
    if quantized != is_quantized(state):
        return False
    for key in (moment, f"{moment}_absmax"):
        if key in state:
            state[key].copy_(pieces[0].file.get_tensor(f"{support.name}/{key}"))
    return True
