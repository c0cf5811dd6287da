"""What a mask selects, tensor by tensor, and by role and layer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

from trace_dist.masks.mask import Mask
from trace_dist.models.roles import describe

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Count:
    """How much of some tensors a mask selects.

    Attributes:
        tensors: how many they are.
        touched: how many of them it selects something of.
        units: selected units.
        entries: selected elements.
        numel: their elements.
    """

    tensors: int
    touched: int
    units: int
    entries: int
    numel: int

    @property
    def density(self) -> float:
        """Selected elements / elements; 0 where there are none, as in files of others."""
        return self.entries / self.numel if self.numel else 0.0

    def __add__(self, other: Count) -> Count:
        return Count(**{name: value + getattr(other, name) for name, value in vars(self).items()})


@dataclass(frozen=True)
class TensorCount:
    """One maskable tensor.

    Attributes:
        name: of the parameter.
        role: what it does; that of an encoder begins with its name, as ``vision q``.
        layer: index of its layer; None outside the layers.
        count: what is selected.
    """

    name: str
    role: str
    layer: int | None
    count: Count


def tensor_counts(mask: Mask) -> list[TensorCount]:
    """Every maskable tensor, in the model's order."""
    infos = describe({name: layout.shape for name, layout in mask.layouts.items()})
    found = []
    for name, layout in mask.layouts.items():
        info, units = infos[name], mask.units.get(name)
        count = Count(1, 0, 0, 0, layout.numel)
        if units is not None:
            count = replace(count, touched=1, units=len(units), entries=int(layout.sizes(units).sum()))
        role = info.role if info.tower == "text" else f"{info.tower} {info.role}"
        found.append(TensorCount(name, role, info.layer, count))
    return found


def summed(tensors: Iterable[TensorCount], key: Callable[[TensorCount], Key]) -> dict[Key, Count]:
    """The counts of tensors with one key, added up; in the order in which the keys appear."""
    found: dict[Key, Count] = {}
    for each in tensors:
        at = key(each)
        found[at] = found[at] + each.count if at in found else each.count
    return found
