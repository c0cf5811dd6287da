"""[Note: units] What is selected together.

A unit is a run of ``unit`` elements of a row-major flattened parameter, ``stride`` elements apart. A parameter of shape
``[..., rows, cols]`` (1-D: one row) is divided in one of three ways:

- ``unit <= cols``: every row is cut into ``ceil(cols / unit)`` units, the last one shorter when ``unit`` does not divide
  ``cols`` (the layout is then *ragged*);
- ``unit > cols``: ``unit`` is a whole number of rows (an attention head, or the whole tensor);
- ``stride = cols`` and ``unit = rows``: a column, all weights of one matrix at one input neuron.

Units are numbered row by row, columns matrix by matrix. In a layout that is neither ragged nor made of columns, unit ``u``
covers ``[u * unit, (u + 1) * unit)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class UnitLayout:
    """How one parameter is divided into units.

    Args:
        shape: full shape of the parameter.
        unit: elements per unit.
        stride: elements from one element of a unit to the next: 1, or the length of a row for columns.

    Raises:
        ValueError: the unit is larger than a row and not a whole number of rows, or the stride is not that of a column.
    """

    shape: tuple[int, ...]
    unit: int
    stride: int = 1

    def __post_init__(self) -> None:
        if self.unit < 1:
            raise ValueError(f"unit={self.unit}: must be at least 1; use 1 for single elements")
        if self.stride != 1:
            if len(self.shape) < 2 or (self.unit, self.stride) != self.shape[-2:]:
                raise ValueError(
                    f"stride={self.stride}: shape {self.shape} has no columns of {self.unit} elements at that distance; "
                    "use stride 1, or a row's length with a column's as the unit"
                )
        elif self.unit > self.cols and (self.unit % self.cols or self.numel % self.unit):
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
        return self.stride == 1 and self.unit < self.cols and self.cols % self.unit != 0

    @property
    def scattered(self) -> bool:
        """Whether units are not equal, contiguous runs."""
        return self.ragged or self.stride > 1

    @property
    def lines(self) -> Literal["rows", "columns"] | None:
        """What of a matrix the units are made of, where each is some whole rows or columns of it and none is all of it.

        Of a gradient only those lines need be formed. None for units inside rows and for parameters that are not matrices.
        """
        if len(self.shape) != 2:
            return None
        if self.stride > 1:
            return "columns"
        return None if self.unit % self.cols or self.unit == self.numel else "rows"

    @property
    def units_per_row(self) -> int:
        """Units in one row; meaningful for ``unit <= cols``."""
        return ceil(self.cols / self.unit)

    @property
    def num_units(self) -> int:
        return self.numel // self.cols * self.units_per_row if self.ragged else self.numel // self.unit

    @property
    def index_dtype(self) -> torch.dtype:
        """int32 where every unit index fits, else int64."""
        return torch.int32 if self.num_units < 2**31 else torch.int64

    @property
    def element_dtype(self) -> torch.dtype:
        """int32 where every flat element index fits, else int64."""
        return torch.int32 if self.numel < 2**31 else torch.int64

    def sizes(self, units: Tensor) -> Tensor:
        """Elements in each of the given units: [n] int64."""
        sizes = torch.full(units.shape, self.unit, dtype=torch.int64, device=units.device)
        if self.ragged:
            last = units.long() % self.units_per_row == self.units_per_row - 1
            sizes.masked_fill_(last, self.cols - (self.units_per_row - 1) * self.unit)
        return sizes

    def elements(self, units: Tensor, num_elements: int | None = None) -> Tensor:
        """Flat indices of the elements of sorted units, in rising order: [sum of sizes] int64.

        Args:
            units: unit indices.
            num_elements: the sum of their sizes; given, an accelerator is not waited for.
        """
        units = units.long()
        lanes = torch.arange(min(self.unit, max(self.numel, 1)), device=units.device)
        if self.stride > 1:
            start = units // self.cols * (self.unit * self.cols) + units % self.cols
            elements = (lanes[:, None] * self.stride + start).flatten()
            return elements if len(self.shape) == 2 else elements.sort().values
        if not self.ragged:
            return (units[:, None] * self.unit + lanes).flatten()
        start = units // self.units_per_row * self.cols + units % self.units_per_row * self.unit
        sizes = self.sizes(units)
        num_elements = int(sizes.sum()) if num_elements is None else num_elements
        to_start = start - sizes.cumsum(0) + sizes  # from an element's place among all
        places = torch.arange(num_elements, device=units.device)
        return places + to_start.repeat_interleave(sizes, output_size=num_elements)

    def runs(self, units: Tensor, num_elements: int | None = None) -> tuple[Tensor, int]:
        """The units as ``(unit indices, elements per unit)`` of equal, contiguous runs; ``num_elements`` as of ``elements``.

        A ragged layout and columns fall back to single elements, so that whoever reads the runs never meets a short or a
        scattered one.
        """
        if not self.scattered:
            return units, self.unit
        return self.elements(units, num_elements).to(self.element_dtype), 1

    def unit_of(self, elements: Tensor) -> Tensor:
        """Unit index of each flat element index: int64."""
        elements = elements.long()
        if self.stride > 1:
            return elements // (self.unit * self.cols) * self.cols + elements % self.cols
        if not self.ragged:
            return elements // self.unit
        return elements // self.cols * self.units_per_row + elements % self.cols // self.unit

    def unit_range(self, start: int, stop: int) -> range:
        """Unit indices among which are all that have elements in [start, stop); a column's are those of whole matrices."""
        if stop <= start:
            return range(0)
        if self.stride > 1:
            matrix = self.unit * self.cols
            return range(start // matrix * self.cols, -(-stop // matrix) * self.cols)
        first, last = self.unit_of(torch.tensor([start, stop - 1])).tolist()
        return range(first, last + 1)


def unit_layout(shape: Sequence[int], granularity: str, block: int, head_rows: int | None) -> UnitLayout:
    """The layout of a parameter under a granularity.

    Args:
        shape: full shape of the parameter.
        granularity: element, block, row, column, head or tensor.
        block: elements per unit for ``block``; a shorter row is one unit.
        head_rows: rows of one attention head, or None where the parameter has no heads (its rows are then the units).

    Returns:
        The layout. A 1-D parameter has one element per output neuron, so its rows, columns and blocks are elements; the columns
        of fused experts [num_experts, rows, cols] are those of each expert.
    """
    shape = tuple(shape)
    cols = shape[-1] if shape else 1
    if granularity == "tensor":
        return UnitLayout(shape, prod(shape))
    if granularity == "element" or len(shape) < 2:
        return UnitLayout(shape, 1)
    if granularity == "block":
        return UnitLayout(shape, min(block, cols))
    if granularity == "column":
        return UnitLayout(shape, shape[-2], cols)
    if granularity == "head" and head_rows is not None:
        return UnitLayout(shape, head_rows * cols)
    if granularity in ("row", "head"):
        return UnitLayout(shape, cols)
    raise ValueError(
        f"mask.granularity={granularity!r}: unknown; use element, block, row, column, head or tensor"
    )
