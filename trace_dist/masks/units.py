"""[Note: units] What is selected together.

A unit is a run of ``unit`` contiguous elements of a row-major flattened parameter. A parameter of shape
``[..., cols]`` (1-D: one row) is divided in one of two ways:

- ``unit <= cols``: every row is cut into ``ceil(cols / unit)`` units, the last one shorter when ``unit`` does not divide
  ``cols`` (the layout is then *ragged*);
- ``unit > cols``: ``unit`` is a whole number of rows (an attention head, or the whole tensor).

Units are numbered row by row. In a layout that is not ragged, unit ``u`` covers ``[u * unit, (u + 1) * unit)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class UnitLayout:
    """How one parameter is divided into units.

    Args:
        shape: full shape of the parameter.
        unit: elements per unit.

    Raises:
        ValueError: the unit is larger than a row and not a whole number of rows.
    """

    shape: tuple[int, ...]
    unit: int

    def __post_init__(self) -> None:
        if self.unit < 1:
            raise ValueError(f"unit={self.unit}: must be at least 1; use 1 for single elements")
        if self.unit > self.cols and (self.unit % self.cols or self.numel % self.unit):
            raise ValueError(
                f"unit={self.unit}: shape {self.shape} does not divide into such units; use at most {self.cols} "
                "elements, or a number of whole rows that divides the number of rows"
            )

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def cols(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def ragged(self) -> bool:
        """Whether the last unit of each row is shorter."""
        return self.unit < self.cols and self.cols % self.unit != 0

    @property
    def units_per_row(self) -> int:
        """Units in one row; meaningful for ``unit <= cols``."""
        return ceil(self.cols / self.unit)

    @property
    def num_units(self) -> int:
        if self.unit > self.cols:
            return self.numel // self.unit
        return self.numel // self.cols * self.units_per_row

    @property
    def index_dtype(self) -> torch.dtype:
        """int32 where every unit index fits, else int64."""
        return torch.int32 if self.num_units < 2**31 else torch.int64

    def sizes(self, units: Tensor) -> Tensor:
        """Elements in each of the given units: [n] int64."""
        sizes = torch.full(units.shape, self.unit, dtype=torch.int64, device=units.device)
        if self.ragged:
            last = units.long() % self.units_per_row == self.units_per_row - 1
            sizes[last] = self.cols - (self.units_per_row - 1) * self.unit
        return sizes

    def elements(self, units: Tensor) -> Tensor:
        """Flat indices of the elements of sorted units, in order: [sum of sizes] int64."""
        units = units.long()
        lanes = torch.arange(min(self.unit, max(self.numel, 1)), device=units.device)
        if not self.ragged:
            return (units[:, None] * self.unit + lanes).flatten()
        column = units % self.units_per_row * self.unit
        start = units // self.units_per_row * self.cols + column
        keep = column[:, None] + lanes < self.cols
        return (start[:, None] + lanes)[keep]

    def runs(self, units: Tensor) -> tuple[Tensor, int]:
        """The units as ``(unit indices, elements per unit)`` of equal, contiguous runs.

        A ragged layout falls back to single elements, so that whoever reads the runs never meets a short one.
        """
        if not self.ragged:
            return units, self.unit
        dtype = torch.int32 if self.numel < 2**31 else torch.int64
        return self.elements(units).to(dtype), 1

    def unit_of(self, elements: Tensor) -> Tensor:
        """Unit index of each flat element index: int64."""
        elements = elements.long()
        if not self.ragged:
            return elements // self.unit
        return elements // self.cols * self.units_per_row + elements % self.cols // self.unit


def unit_size(shape: Sequence[int], granularity: str, block: int, head_rows: int | None) -> int:
    """Elements per unit of a parameter under a granularity.

    Args:
        shape: full shape of the parameter.
        granularity: element, block, row, head or tensor.
        block: elements per unit for ``block``; a shorter row is one unit.
        head_rows: rows of one attention head, or None where the parameter has no heads (its rows are then the units).

    Returns:
        Elements per unit. A 1-D parameter has one element per output neuron, so its rows and blocks are elements.
    """
    numel, cols = prod(shape), shape[-1] if shape else 1
    if granularity == "tensor":
        return numel
    if granularity == "element" or len(shape) < 2:
        return 1
    if granularity == "block":
        return min(block, cols)
    if granularity == "head" and head_rows is not None:
        return head_rows * cols
    if granularity in ("row", "head"):
        return cols
    raise ValueError(f"mask.granularity={granularity!r}: unknown; use element, block, row, head or tensor")
