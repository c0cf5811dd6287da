"""A mask: for every maskable parameter the layout of its units, and the sorted indices of the selected ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trace_dist.config.mask import FREE, Spread
from trace_dist.masks import storage
from trace_dist.masks.gaps import PackedUnits
from trace_dist.masks.layouts import layouts_for
from trace_dist.masks.select import SetOperation, Units, combined_units, random_units
from trace_dist.masks.tied import Tied
from trace_dist.masks.units import UnitLayout
from trace_dist.models.fingerprint import fuller, same_model
from trace_dist.utils.files import reading
from trace_dist.utils.sealed import check_header

HASHED_UNITS = 1 << 20
"""Unit indices that are hashed at a time, as int64, for a digest of an earlier release."""
OF_GAPS = "gaps-"
"""Begins the digests of encoded indices; those of earlier releases are of the decoded ones, eight bytes for each."""


@dataclass(frozen=True, eq=False)
class Mask:
    """Which entries of a model may be trained. Two masks are equal when they select the same units of the same layouts.

    Attributes:
        units: parameter name -> sorted unique unit indices, [k] int32 or int64 on the CPU; only parameters with k > 0. They lie
            in memory as gaps and are decoded at each access: take them out once.
        layouts: parameter name -> layout, for every *maskable* parameter, selected or not.
        granularity: element, block, row, column, head or tensor; by role as ``row,q=head``.
        meta: where it comes from: ``model`` (fingerprint), ``task``, ``method``, the ``density`` that was asked for; ``quantize``
            of a delta's on a 4-bit base.

    Raises:
        ValueError: no unit is selected, or indices are unsorted, repeated or out of range.
    """

    units: PackedUnits
    layouts: Mapping[str, UnitLayout]
    granularity: str
    meta: Mapping[str, Any]

    def __init__(
        self,
        units: Mapping[str, Tensor],
        layouts: Mapping[str, UnitLayout],
        granularity: str,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        _check(units, layouts)
        for name, value in (("layouts", layouts), ("granularity", granularity), ("meta", meta or {})):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "units", PackedUnits(units))

    @property
    def num_entries(self) -> int:
        """How many elements are selected."""
        return sum(int(self.layouts[name].sizes(indices).sum()) for name, indices in self.units.items())

    @property
    def num_maskable(self) -> int:
        """How many elements all maskable parameters have."""
        return sum(layout.numel for layout in self.layouts.values())

    @property
    def density(self) -> float:
        """Selected elements / elements of all maskable parameters, in (0, 1]."""
        return self.num_entries / self.num_maskable

    def tensor_density(self, name: str) -> float:
        """Selected elements / elements of one maskable parameter, in [0, 1]."""
        indices = self.units.get(name)
        layout = self.layouts[name]
        return 0.0 if indices is None else int(layout.sizes(indices).sum()) / layout.numel

    def elements(self, name: str) -> Tensor:
        """Flat indices of the selected elements of one parameter: [k] int64, sorted."""
        return self.layouts[name].elements(self.units[name])

    def dense(self, name: str) -> Tensor:
        """Which elements of a parameter are selected, for tests and small models: bool, of the parameter's shape, on the CPU."""
        layout = self.layouts[name]
        out = torch.zeros(layout.numel, dtype=torch.bool)
        if name in self.units:
            out[self.elements(name)] = True
        return out.view(layout.shape)

    def digest(self) -> str:
        """SHA-256 over names, layouts and encoded indices: equal on every rank, or the ranks disagree. Computed once.

        Returns:
            ``gaps-`` and 64 hexadecimal digits.
        """
        return self._of_gaps

    def has_digest(self, digest: object) -> bool:
        """Whether a digest that was kept is this mask's; one of an earlier release takes longer."""
        if not isinstance(digest, str):
            return False
        return digest == (self._of_gaps if digest.startswith(OF_GAPS) else self._of_indices)

    @cached_property
    def _of_gaps(self) -> str:
        digest = hashlib.sha256(self.granularity.encode())
        for name in sorted(self.units):
            words = self.units.gaps[name].words
            digest.update(f"{self._about(name)} {len(words)} {words.dtype}".encode())
            digest.update(words.numpy().data)
        return OF_GAPS + digest.hexdigest()

    @cached_property
    def _of_indices(self) -> str:
        digest = hashlib.sha256(self.granularity.encode())
        for name in sorted(self.units):
            digest.update(self._about(name).encode())
            for units in self.units[name].split(HASHED_UNITS):
                digest.update(units.long().numpy())
        return digest.hexdigest()

    def _about(self, name: str) -> str:
        layout = self.layouts[name]
        stride = f"/{layout.stride}" if layout.stride > 1 else ""
        return f"{name}{layout.shape}{layout.unit}{stride}"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return dict(self.layouts) == dict(other.layouts) and self.digest() == other.digest()

    def with_meta(self, **meta: Any) -> Mask:
        """The same mask with more metadata."""
        return Mask(self.units, self.layouts, self.granularity, {**self.meta, **meta})

    def with_elements(self, elements: Mapping[str, Tensor]) -> Mask:
        """The same mask and, beside it, the units in which some elements lie; parameter -> flat indices.

        Raises:
            ValueError: a parameter is not maskable.
        """
        if not elements:
            return self
        units = dict(self.units)
        for name, indices in elements.items():
            layout = self.layouts.get(name)
            if layout is None:
                raise ValueError(
                    f"mask.maskable: {name} is always trained, and must be maskable; set it to linear or all, or let the "
                    "expression find it"
                )
            found = layout.unit_of(indices)
            if name in units:
                found = torch.cat([found, units[name].long()])
            units[name] = found.unique().to(layout.index_dtype)
        return Mask(units, self.layouts, self.granularity, self.meta)

    def save(self, path: str | Path) -> None:
        """Write the mask file (format in docs/formats.md), whole or not at all.

        Raises:
            ValueError: it cannot be written (no space, no permission); what was there stays.
        """
        fields = {
            "granularity": self.granularity,
            "density": self.density,
            "digest": self.digest(),
            "meta": dict(self.meta),
        }
        storage.save(Path(path), "mask", self.units, self.layouts, fields)

    @staticmethod
    def load(path: str | Path) -> Mask:
        """Read a mask file.

        Raises:
            ValueError: it is missing, corrupt or not a mask.
        """
        tensors, layouts, header = storage.load(Path(path), "mask", ("granularity", "digest", "meta"))
        with reading(Path(path), "mask"):
            mask = Mask(tensors, layouts, header["granularity"], header["meta"])
            same = mask.has_digest(header["digest"])
        if not same:
            raise ValueError(
                f"{path}: corrupt mask file (its indices do not match their digest); restore it from a copy or make it again"
            )
        check_header(header, Path(path), "mask")
        return mask

    @staticmethod
    def random(
        model: Any,
        density: float,
        granularity: str = "element",
        seed: int = 0,
        block: int = 32,
        maskable: str = "linear",
    ) -> Mask:
        """A uniformly random mask of the same density in every tensor, as far as whole units allow.

        Args:
            model: a transformers model, whatever wraps it, or a sharded model.
            density: share of the maskable elements, in (0, 1].
            granularity: element, block, row (output neuron), column (input neuron), head or tensor; of some roles another one, as
                in ``row,q=head,down=column``.
            seed: equal seeds give equal masks, on every rank and whatever the backend.
            block: contiguous elements of a unit, for granularity block.
            maskable: ``linear`` (every linear layer but the output head), ``all``, or a regular expression over names.

        Raises:
            ValueError: the density is out of range or selects no whole unit, the granularity is unknown, or nothing is maskable.
        """
        layouts = layouts_for(model, granularity, block, maskable)
        return random_mask(layouts, granularity, density, seed)

    def __or__(self, other: Mask) -> Mask:
        return combine(self, other, "union") if isinstance(other, Mask) else NotImplemented

    def __and__(self, other: Mask) -> Mask:
        return combine(self, other, "intersection") if isinstance(other, Mask) else NotImplemented

    def __sub__(self, other: Mask) -> Mask:
        return combine(self, other, "difference") if isinstance(other, Mask) else NotImplemented

    def __iter__(self) -> Iterator[str]:
        return iter(self.units)

    def __len__(self) -> int:
        return len(self.units)


def check_mask(mask: object) -> None:
    """Raise ValueError where something else than a mask was given as one, as its path."""
    if not isinstance(mask, Mask):
        raise ValueError(
            f"mask: is a {type(mask).__name__}, not a mask; give one of Mask.load(path) or Mask.random(model, density)"
        )


def random_mask(
    layouts: Mapping[str, UnitLayout],
    granularity: str,
    density: float,
    seed: int,
    refused: Units | None = None,
    spread: Spread = FREE,
) -> Mask:
    """A random mask with the same density in every tensor, as far as whole units and what is not refused allow."""
    meta = {"method": "random", "seed": seed}
    tied = Tied.of(layouts, granularity)
    units = random_units(tied.layouts, density, seed, tied.refused(refused), spread)
    return Mask(tied.written_out(units), layouts, granularity, meta)


TWO = ("the first mask", "the second")
"""How errors call two masks that have no names."""


def check_combinable(left: Mask, right: Mask, names: tuple[str, str] = TWO) -> None:
    """Raise ValueError, naming both, where two masks differ in model, granularity or shapes."""
    what, models = " and ".join(names), _models(left, right)
    if len(models) > 1 and not same_model(*models):
        both = " and ".join(models)
        raise ValueError(f"mask: {what} were made for the models {both}; combine masks of one model")
    differing = [
        name
        for name in {**left.layouts, **right.layouts}
        if left.layouts.get(name) != right.layouts.get(name)
    ]
    if left.granularity != right.granularity:
        details = f"{left.granularity} and {right.granularity}"
    elif differing:
        units = [mask.layouts.get(differing[0]) for mask in (left, right)]
        details = " and ".join(
            "not there" if u is None else f"{list(u.shape)} in units of {u.unit}" for u in units
        )
        details = f"{differing[0]}: {details}"
    else:
        return
    raise ValueError(
        f"mask: {what} ({details}) differ in granularity or shapes; combine masks of one model and granularity"
    )


def combine(left: Mask, right: Mask, operation: SetOperation, names: tuple[str, str] = TWO) -> Mask:
    """Union, intersection or difference of two masks of one model.

    Args:
        left, right: the masks.
        operation: which.
        names: of the masks, for errors.

    Raises:
        ValueError: granularity, layouts or models differ, or nothing is left.
    """
    check_combinable(left, right, names)
    units = combined_units(left.units, right.units, left.layouts, operation)
    if not units:
        raise ValueError(
            f"mask: the {operation} of {' and '.join(names)} selects nothing, so nothing would train; choose other masks"
        )
    models = _models(left, right)
    model = fuller(*models) if len(models) > 1 else next(iter(models), None)
    return Mask(units, left.layouts, left.granularity, {"model": model, "method": operation})


def _models(*masks: Mask) -> list[str]:
    """Fingerprints of the models that masks say they are of."""
    return [str(mask.meta["model"]) for mask in masks if mask.meta.get("model") is not None]


def _check(units: Mapping[str, Tensor], layouts: Mapping[str, UnitLayout]) -> None:
    """Raise ValueError unless the units make a mask of these layouts."""
    if not units or all(len(indices) == 0 for indices in units.values()):
        raise ValueError("mask: it selects nothing, so nothing would train; raise mask.density")
    for name, indices in units.items():
        layout = layouts.get(name)
        if layout is None:
            raise ValueError(f"mask: parameter {name!r} has units but no layout; make the mask again")
        if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"mask: units of {name!r} are {list(indices.shape)} {indices.dtype}, not a list of int32 or int64; "
                "make the mask again"
            )
        if len(indices) == 0:
            raise ValueError(f"mask: parameter {name!r} is listed without units; leave it out")
        if len(indices) > 1 and not bool((indices[1:] > indices[:-1]).all()):
            raise ValueError(f"mask: units of {name!r} are not sorted and unique; make the mask again")
        if int(indices[0]) < 0 or int(indices[-1]) >= layout.num_units:
            raise ValueError(
                f"mask: a unit of {name!r} lies outside its {layout.num_units} units; make it again"
            )
