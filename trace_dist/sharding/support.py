"""A rank's support: the masked entries of one parameter that it owns, and where their gradient adds up."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from trace_kernels.compact import compact_gather
from trace_kernels.gap_gather import chunk_starts, gap_gather
from trace_kernels.runs import Runs, entries_below

from trace_dist.masks.gaps import Gaps
from trace_dist.masks.mask import Mask
from trace_dist.masks.units import UnitLayout
from trace_dist.sharding.masked_linear import ALIGNED_LINES, Part
from trace_dist.sharding.views import PartitionView
from trace_dist.utils.devices import sent


class Partitioned(Protocol):
    """What a support must know of a sharded model (``sharding.base.ShardedModel``)."""

    @property
    def rank(self) -> int:
        """This rank."""

    def names(self) -> list[str]:
        """Parameter names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a parameter."""

    def views(self, name: str) -> list[PartitionView]:
        """What every rank owns of a parameter."""

    def like(self, name: str) -> Tensor:
        """An empty tensor of the dtype of a weight's values, on the device where this rank keeps them."""


class Sharing(Partitioned, Protocol):
    """A sharded model that may do without other ranks' indices."""

    def indices_may_leave(self, name: str) -> bool:
        """Whether nothing but a backward pass needs to know where the masked entries of other ranks are in a weight."""


@dataclass(eq=False)
class Support:
    """The masked entries of one parameter, seen from one rank.

    Attributes:
        name: parameter name.
        shape: full shape of the parameter.
        runs: the masked entries inside this rank's view.
        gaps: every selected unit of the parameter, encoded, where several ranks share them; see ``whole``.
        layout: of the units.
        part: the whole rows or columns that the mask selects; its entries are that part of the gradient, row-major. Or single
            entries, where they are very few.
        splits: masked entries per rank, in rank order.
        rank: this rank.
        grad: [runs.num_entries] fp32, the gradient that has accumulated (fp64 for an fp64 model); empty when the gradients
            go elsewhere (``attach(mask, accumulate=...)``).
        starts: of the gaps of single elements, where a kernel decodes them (``trace_kernels.gap_gather``): on accelerators.
        reached: whether some rank's loss has depended on the parameter since the gradients were reset, as it is known on every
            rank after a backward pass. One that was not reached is not updated, as torch's optimizers skip ``grad is None``.
        away: whether the gaps are shared out over the ranks, and here for moments only (``sharding.index_shares``).
        decodes: whether a kernel decodes the gaps.
    """

    name: str
    shape: tuple[int, ...]
    runs: Runs
    gaps: Gaps | None
    layout: UnitLayout
    part: Part
    splits: list[int]
    rank: int
    grad: Tensor
    starts: Tensor | None = None
    reached: bool = False
    away: bool = False
    decodes: bool = False

    @property
    def num_entries(self) -> int:
        """Masked entries of the parameter, on all ranks."""
        return sum(self.splits)

    def whole(self) -> Runs:
        """Every masked entry of the parameter (base 0), decoded anew where several ranks share them.

        Every rank picks all ranks' entries out of its own gradient, one parameter at a time. Kept decoded, single elements would
        take four bytes per entry of the model on every rank: with many ranks, more than the states.
        """
        if self.gaps is None:
            if self.away:
                raise AssertionError(f"{self.name}: where other ranks' entries are has not been gathered")
            return self.runs
        return Runs.whole(*self.layout.runs(self.gaps.decode(), self.num_entries), self.layout.numel)

    def pick(self, flat: Tensor, scale: float) -> Tensor:
        """The values, times ``scale``, that a whole flattened tensor has at every masked entry: fp32, or fp64 of fp64."""
        if self.gaps is None or self.starts is None:
            return compact_gather(flat, self.whole(), scale=scale)
        return gap_gather(flat, self.gaps.words, self.starts, self.num_entries, scale=scale)

    def indices(self) -> list[Tensor]:
        """What this rank keeps to know where the entries are."""
        shared = [] if self.gaps is None or self.away else [self.gaps.words]
        return [self.runs.units, *shared, *([] if self.starts is None or self.away else [self.starts])]

    @property
    def offset(self) -> int:
        """Entries that belong to lower ranks."""
        return sum(self.splits[: self.rank])


Accumulate = Callable[[Support, Tensor], None]
"""What happens to the reduced gradient at this rank's entries of a support: [runs.num_entries]."""


def add_to_grad(support: Support, values: Tensor) -> None:
    """The usual case: gradients add up in the support's buffer."""
    support.grad.add_(values)


def build_supports(model: Partitioned, mask: Mask, away: Container[str] = ()) -> list[Support]:
    """The supports of a mask on this rank, in the model's parameter order; their gradient buffers are still empty.

    Args:
        model: the model.
        mask: the mask.
        away: parameters whose gaps are not kept, where several ranks share them.

    Raises:
        ValueError: a parameter is missing or has another shape: the mask is of another model.
    """
    names = model.names()
    known = set(names)
    for name in mask.units:
        if name not in known:
            raise ValueError(
                f"mask: parameter {name!r} is not in the model; give the mask that was made for this model"
            )
        if tuple(mask.layouts[name].shape) != model.shape(name):
            raise ValueError(
                f"mask: {name!r} has shape {tuple(mask.layouts[name].shape)} in the mask but {model.shape(name)} in the model; "
                "give the mask that was made for this model, or project it"
            )
    return [_support(model, mask, name, name in away) for name in names if name in mask.units]


def value_supports(model: Sharing, mask: Mask) -> list[Support]:
    """As ``build_supports``, to read and write values alone: where other ranks' entries are is not kept, unless the model asks
    for it outside of backward passes."""
    return build_supports(model, mask, list(filter(model.indices_may_leave, mask.units)))


def _support(model: Partitioned, mask: Mask, name: str, away: bool) -> Support:
    """Everything is counted on the CPU, where masks lie: an accelerator would be waited for at each number."""
    layout, gaps = mask.layouts[name], mask.units.gaps[name]
    like, views = model.like(name), model.views(name)
    selected = gaps.decode()
    units, block = layout.runs(selected)
    mine = views[model.rank]
    runs = Runs.clip(units, block, mine.start, mine.stop, layout.numel)
    shared = len(views) > 1
    splits = [runs.num_entries]
    if shared:
        below = entries_below(units, block, [*(view.start for view in views), views[-1].stop])
        splits = [stop - start for start, stop in pairwise(below)]
    on_cpu = like.device.type == "cpu"
    part = _part(layout, selected, like.device).aligned(1 if on_cpu else ALIGNED_LINES)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    single = layout.unit == 1 and not layout.scattered
    decodes = shared and single and not on_cpu and dtype == torch.float32
    return Support(
        name=name,
        shape=layout.shape,
        runs=(runs.copied() if shared else runs).to(like.device),  # a copy: the rest goes
        gaps=gaps.to(like.device) if shared and not away else None,
        layout=layout,
        part=part.to(like.device),
        splits=splits,
        rank=model.rank,
        grad=torch.empty(0, dtype=dtype, device=like.device),
        starts=sent(chunk_starts(gaps.words), like.device) if decodes and not away else None,
        away=shared and away,
        decodes=decodes,
    )


SINGLE = 1.25e-3
"""Density of a matrix up to which gradients are computed entry by entry: on a CPU that takes between a fiftieth and a half of the
time of the dense product. Accelerators multiply faster than they gather."""


def _part(layout: UnitLayout, units: Tensor, device: torch.device) -> Part:
    """The rows or columns of a matrix that the units are; few single entries; all of it where they are neither."""
    if layout.lines == "columns":
        return Part(columns=units.long())
    if layout.lines is None:
        few = len(layout.shape) == 2 and int(layout.sizes(units).sum()) <= SINGLE * layout.numel
        if not few or device.type != "cpu":
            return Part()
        entries = layout.elements(units)
        return Part(entries // layout.cols, entries % layout.cols, single=True)
    rows_per_unit = layout.unit // layout.cols
    lanes = torch.arange(rows_per_unit, device=units.device)
    return Part(rows=(units.long()[:, None] * rows_per_unit + lanes).flatten())
