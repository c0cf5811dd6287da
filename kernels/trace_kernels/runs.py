"""Runs: where the masked entries of one rank's slice of a parameter lie.

A mask selects *units* (runs of ``block`` contiguous elements) of a row-major flattened parameter. ZeRO-3
and FSDP2 give each rank one interval of that parameter, the *partition view* ``[base, base + numel)``. A
`Runs` is the part of the mask inside the view, its *support*; a unit that straddles an edge of the view is
kept, clipped.

[Note: compact order]
Every compact tensor holds one value per support entry, in rising global order. Compact position ``p`` maps to
the local slice by, in 64-bit arithmetic (a parameter may hold more than 2^31 elements)::

    q     = p + skip                                        # position in the concatenated, unclipped units
    local = units[q // block] * block + q % block - base

so that the compact tensors of all ranks, concatenated in rank order, are the compact tensor of the whole
parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 16
"""Entries handled at a time by the torch paths: the six fp32 operands of AdamW then fit a 2 MiB L2 cache."""


@dataclass(frozen=True)
class Piece:
    """Compact positions ``[start, stop)`` and where they lie in the local slice; the step of the torch paths.

    With ``rows`` None the piece is one stretch of the slice that begins at ``offset``. Otherwise the slice,
    from ``offset`` on, is seen as rows of ``block`` elements, and the piece is the rows ``rows`` (int64) of
    that table.
    """

    start: int
    stop: int
    offset: int
    block: int = 1
    rows: Tensor | None = None

    def gather(self, local: Tensor) -> Tensor:
        """Returns the entries, [stop - start], in the dtype of ``local``. May be a view of ``local``."""
        if self.rows is None:
            return local.narrow(0, self.offset, self.stop - self.start)
        if self.block == 1:
            return local.index_select(0, self.rows)
        return self._table(local).index_select(0, self.rows).view(-1)

    def scatter(self, local: Tensor, values: Tensor) -> None:
        """Writes ``values`` [stop - start], already of the dtype of ``local``, to the entries."""
        if self.rows is None:
            local.narrow(0, self.offset, self.stop - self.start).copy_(values)
        elif self.block == 1:
            local.index_copy_(0, self.rows, values)
        else:
            # index_copy_ moves one element at a time: hand it the widest words that tile both tables.
            word = _widest_word(self.block, local[self.offset :], values)
            table, source = self._table(local).view(word), values.view(-1, self.block).view(word)
            table.index_copy_(0, self.rows, source)

    def indices(self, device: torch.device) -> Tensor:
        """Returns the local index of each entry, int64 [stop - start]."""
        if self.rows is None:
            return torch.arange(self.offset, self.offset + self.stop - self.start, device=device)
        lanes = torch.arange(self.offset, self.offset + self.block, device=device)
        return (self.rows[:, None] * self.block + lanes).view(-1)

    def _table(self, local: Tensor) -> Tensor:
        num_rows = (local.numel() - self.offset) // self.block
        return local.narrow(0, self.offset, num_rows * self.block).view(num_rows, self.block)


@dataclass(frozen=True, eq=False)
class Runs:
    """Masked entries of one rank's 1-D slice of a row-major flattened parameter, as runs of ``block``
    elements.

    Build it with `Runs.clip`. Construction checks every field (on an accelerator that costs a
    synchronisation), so build once per mask and reuse.
    """

    units: Tensor
    """[num_units] int32 or int64, sorted, unique global ids; unit u covers flat [u*block, (u+1)*block)."""
    block: int
    """Elements per unit: 1 (element), 16..128 (block), in_features (row), that * head_dim (head), numel."""
    base: int
    """Global flat index of local element 0, the start of the partition view."""
    numel: int
    """Length of the local slice; the view is [base, base + numel)."""
    num_entries: int
    """Masked entries inside the view: the length of every compact tensor."""
    skip: int
    """Leading elements of the first unit that lie left of the view (cut off by the shard edge)."""

    def __post_init__(self) -> None:
        _check_units(self.units)
        if self.block < 1:
            raise ValueError(f"block = {self.block}: must be at least 1; pass the elements per unit")
        if self.base < 0 or self.numel < 0:
            raise ValueError(
                f"view [{self.base}, {self.base + self.numel}): must be an interval of indices >= 0"
            )
        skip, tail = _edges(self.units, self.block, self.base, self.base + self.numel)
        num_entries = self.num_units * self.block - skip - tail
        if (self.skip, self.num_entries) != (skip, num_entries):
            raise ValueError(
                f"skip = {self.skip}, num_entries = {self.num_entries}: the units leave {skip} and "
                f"{num_entries} in [{self.base}, {self.base + self.numel}); build the runs with Runs.clip"
            )

    @classmethod
    def clip(cls, all_units: Tensor, block: int, start: int, stop: int, shape_numel: int) -> Runs:
        """Cuts the units of a whole parameter to the partition view ``[start, stop)``.

        Args:
            all_units: [num_units] int32 or int64, sorted, unique, on any device; the result holds a view.
            block: elements per unit.
            start, stop: the view, in elements of the flattened parameter.
            shape_numel: elements of the whole parameter.

        Raises:
            ValueError: the units are unsorted or reach past the parameter, or the view does.
        """
        if not 0 <= start <= stop <= shape_numel:
            raise ValueError(f"view [{start}, {stop}): must lie in the parameter's [0, {shape_numel})")
        if block < 1:
            raise ValueError(f"block = {block}: must be at least 1; pass the elements per unit")
        if all_units.dim() != 1 or all_units.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"units: {_describe(all_units)}; must be 1-D int32 or int64")
        if all_units.numel() and (int(all_units[-1]) + 1) * block > shape_numel:
            raise ValueError(
                f"units: the last, {int(all_units[-1])}, of {block} elements ends past the parameter's "
                f"{shape_numel}; use block = 1 where units do not tile the parameter"
            )
        if all_units.numel() and int(all_units[0]) < 0:
            raise ValueError(f"units: the first is {int(all_units[0])}; must be >= 0")
        first = _count_below(all_units, start // block)
        last = _count_below(all_units, -(-stop // block)) if stop > start else first
        units = all_units[first:last]
        skip, tail = _edges(units, block, start, stop)
        return cls(units, block, start, stop - start, units.numel() * block - skip - tail, skip)

    @classmethod
    def whole(cls, units: Tensor, block: int, numel: int) -> Runs:
        """All units of a whole parameter, unchecked: for units that were checked before, made anew at each use.

        Args:
            units: [num_units] int32 or int64, sorted, unique.
            block: elements per unit.
            numel: elements of the parameter.
        """
        runs = object.__new__(cls)
        fields = (units, block, 0, numel, units.numel() * block, 0)
        for name, value in zip(cls.__dataclass_fields__, fields, strict=True):
            object.__setattr__(runs, name, value)
        return runs

    @classmethod
    def random(cls, numel: int, block: int, density: float, seed: int = 0, device: str = "cpu") -> Runs:
        """A Bernoulli support over a whole parameter of ``numel`` elements, for tests and benchmarks."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.rand(numel // block, generator=generator) < density
        units = chosen.nonzero().view(-1)
        fits = numel // block <= torch.iinfo(torch.int32).max
        return cls.clip(units.to(device, torch.int32 if fits else torch.int64), block, 0, numel, numel)

    @property
    def num_units(self) -> int:
        """Units that touch the view."""
        return self.units.numel()

    @property
    def tail(self) -> int:
        """Trailing elements of the last unit that lie right of the view."""
        return self.num_units * self.block - self.skip - self.num_entries

    def to(self, device: torch.device | str) -> Runs:
        """The same runs with ``units`` on ``device``, which is not waited for: nothing is checked again there."""
        if self.units.device == torch.device(device):
            return self
        # Only from an accelerator has the copy come to an end before it is read.
        return self.with_units(self.units.to(device, non_blocking=self.units.device.type == "cpu"))

    def copied(self) -> Runs:
        """The same runs, whose ``units`` share no memory with what they were cut out of."""
        return self.with_units(self.units.clone())

    def with_units(self, units: Tensor) -> Runs:
        """The same runs from a copy of their units, unchecked."""
        runs = object.__new__(type(self))
        for name in self.__dataclass_fields__:
            object.__setattr__(runs, name, units if name == "units" else getattr(self, name))
        return runs

    def indices(self) -> Tensor:
        """Local index of each entry, int64 [num_entries]: for references; the ops never build it whole."""
        q = torch.arange(self.skip, self.skip + self.num_entries, device=self.units.device)
        unit = self.units.long()[q // self.block]
        return unit * self.block + q % self.block - self.base

    def pieces(self, chunk: int = CHUNK) -> Iterator[Piece]:
        """Walks the support in compact order, at most ``chunk`` entries at a time."""
        if self.block >= chunk:
            yield from self._stretches(0, self.num_units, chunk)
            return
        first = int(self.skip > 0)
        last = max(first, self.num_units - int(self.tail > 0))
        yield from self._stretches(0, min(first, self.num_units), chunk)
        yield from self._tables(first, last, chunk)
        yield from self._stretches(last, self.num_units, chunk)

    def _stretches(self, first: int, last: int, chunk: int) -> Iterator[Piece]:
        """Units [first, last) one by one, each clipped to the view."""
        for index in range(first, last):
            begin = max(0, index * self.block - self.skip)
            end = min(self.num_entries, (index + 1) * self.block - self.skip)
            to_local = int(self.units[index]) * self.block - self.base - (index * self.block - self.skip)
            for start in range(begin, end, chunk):
                yield Piece(start, min(start + chunk, end), start + to_local)

    def _tables(self, first: int, last: int, chunk: int) -> Iterator[Piece]:
        """Whole units [first, last), as rows of the slice."""
        offset = -self.base % self.block
        row_zero = (self.base + offset) // self.block
        for begin in range(first, last, chunk // self.block):
            end = min(begin + chunk // self.block, last)
            start, stop = begin * self.block - self.skip, end * self.block - self.skip
            low, high = int(self.units[begin]) - row_zero, int(self.units[end - 1]) - row_zero
            if high - low == end - begin - 1:
                yield Piece(start, stop, offset + low * self.block)
            else:
                rows = self.units[begin:end].long() - row_zero
                yield Piece(start, stop, offset, self.block, rows)


def entries_below(units: Tensor, block: int, edges: Sequence[int]) -> list[int]:
    """How many elements of the units lie below each edge, in elements of the flattened parameter.

    What lies in the views of many ranks, at the cost of one `Runs.clip`; an accelerator is waited for once.

    Args:
        units: [num_units] int32 or int64, sorted, unique.
        block: elements per unit.
        edges: between 0 and the elements of the parameter.
    """
    if units.numel() == 0:
        return [0] * len(edges)
    at = torch.tensor(edges, dtype=torch.int64).to(units.device, non_blocking=True)
    unit, largest = at // block, torch.iinfo(units.dtype).max
    places = torch.searchsorted(units, unit.clamp(max=largest).to(units.dtype))
    places = places.where(unit <= largest, units.numel())
    is_cut = units[places.clamp(max=units.numel() - 1)] == unit
    found: list[int] = (places * block + is_cut * (at % block)).tolist()
    return found


def _edges(units: Tensor, block: int, start: int, stop: int) -> tuple[int, int]:
    """Elements of the first unit left of the view and of the last unit right of it."""
    if units.numel() == 0:
        return 0, 0
    skip, tail = start - int(units[0]) * block, (int(units[-1]) + 1) * block - stop
    if max(skip, tail) >= block:
        raise ValueError(f"units: some lie outside the view [{start}, {stop}); build the runs with Runs.clip")
    return max(0, skip), max(0, tail)


def _count_below(units: Tensor, bound: int) -> int:
    """How many of the sorted ``units`` are smaller than ``bound``, which may exceed their dtype."""
    if bound > torch.iinfo(units.dtype).max:
        return units.numel()
    return int(torch.searchsorted(units, bound))


def _check_units(units: Tensor) -> None:
    if units.dim() != 1 or units.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"units: {_describe(units)}; must be 1-D int32 or int64")
    if not units.is_contiguous():
        raise ValueError("units: not contiguous; call .contiguous() first")
    if units.numel() and (int(units[0]) < 0 or not bool((units[1:] > units[:-1]).all())):
        raise ValueError("units: must be sorted, unique and >= 0; pass units.unique()")


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def _widest_word(block: int, *tensors: Tensor) -> torch.dtype:
    """The widest integer dtype whose words tile rows of ``block`` elements at the address of each tensor."""
    itemsize = tensors[0].element_size()
    for word in (torch.int64, torch.int32, torch.int16):
        offsets = [tensor.storage_offset() * itemsize for tensor in tensors]
        if word.itemsize >= itemsize and not any(n % word.itemsize for n in (block * itemsize, *offsets)):
            return word
    return tensors[0].dtype
