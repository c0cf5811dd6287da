"""Which part of its target a pruned copy is: kept as ``pruned.json`` in the copy's folder (docs/formats.md).

So an entry of the copy can be found again in the target: its layer, its channels, its heads and its neurons are the target's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trace_dist.models.axes import Axis, axes_of
from trace_dist.models.roles import role_of
from trace_dist.utils.files import read_json, reading, write_text
from trace_dist.utils.sealed import check_version

FILE = "pruned.json"
FORMAT = "trace_dist.pruned"
VERSION = 1


@dataclass(frozen=True)
class Origin:
    """Where a pruned copy comes from.

    Attributes:
        target: fingerprint of the model that it was cut out of.
        stack: path of the list of decoder layers, such as ``model.layers``.
        layers: of each of the copy's layers, its index in the target; rising.
        hidden: channels of the residual stream that were kept, rising; None where all were.
        heads, kv_heads, intermediate: of each of the copy's layers, what was kept, rising; None where all were.
        head_rows: role -> rows of one head, where heads were cut.
    """

    target: str
    stack: str
    layers: Sequence[int]
    hidden: Sequence[int] | None = None
    heads: Sequence[Sequence[int]] | None = None
    kv_heads: Sequence[Sequence[int]] | None = None
    intermediate: Sequence[Sequence[int]] | None = None
    head_rows: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Origin | None:
        """Of the copy in a folder; None where it says nothing of it.

        Raises:
            ValueError: the file is damaged, or of a newer version.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        value = read_json(path)
        with reading(path, "record of pruning"):
            if value.pop("format") != FORMAT:
                raise ValueError(f"is no {FORMAT}")
        check_version(value.pop("version", None), path, VERSION)
        with reading(path, "record of pruning"):
            found = cls(**{each.name: value[each.name] for each in fields(cls)})
            _check(found)
        return found

    def save(self, folder: Path) -> None:
        """Write it beside the copy's weights."""
        write_text(folder / FILE, json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}) + "\n")

    def layer(self, name: str) -> int | None:
        """Index of the layer that a parameter lies in, of the copy or the target; None outside the layers."""
        if not name.startswith(f"{self.stack}."):
            return None
        number = name[len(self.stack) + 1 :].partition(".")[0]
        return int(number) if number.isdecimal() else None

    def moved(self, name: str, layer: int) -> str:
        """The parameter of the same place in another layer."""
        rest = name[len(self.stack) + 1 :].partition(".")[2]
        return f"{self.stack}.{layer}.{rest}"

    def places(self, name: str, shape: Sequence[int]) -> list[Tensor | None]:
        """Where the copy's rows and columns lie in the target: per dimension, [n] int64, None where all were kept.

        Args:
            name: a parameter of the copy.
            shape: its shape in the copy.
        """
        found = [self.kept(axis, name) if axis is not None else None for axis in axes_of(name, len(shape))]
        return [
            None if each is None or len(each) != size else each
            for each, size in zip(found, shape, strict=True)
        ]

    def kept(self, axis: Axis, name: str) -> Tensor | None:
        """Rows or columns of the target that a dimension of the copy's parameter holds: [n] int64; None for all."""
        if axis == "hidden":
            return None if self.hidden is None else torch.tensor(self.hidden)
        layer, of_layers = self.layer(name), getattr(self, axis)
        if layer is None or of_layers is None or layer >= len(of_layers):
            return None
        units = torch.tensor(of_layers[layer])
        if axis == "intermediate":
            return units
        role = role_of(name if name.endswith("weight") else f"{name.removesuffix('bias')}weight")
        rows = self.head_rows["v" if role == "o" else role]
        return (units[:, None] * rows + torch.arange(rows)).flatten()


def _check(origin: Origin) -> None:
    """Raise ValueError unless indices are such, rise, and are of as many layers as there are."""
    lists = [origin.layers, *([origin.hidden] if origin.hidden is not None else [])]
    for of_layers in (origin.heads, origin.kv_heads, origin.intermediate):
        if of_layers is not None:
            if len(of_layers) != len(origin.layers):
                raise ValueError(f"says something of {len(of_layers)} layers, not {len(origin.layers)}")
            lists += of_layers
    for each in lists:
        whole = all(type(index) is int and 0 <= index < 2**31 for index in each)
        if not (each and whole and all(a < b for a, b in pairwise(each))):
            raise ValueError("its indices are no rising whole numbers")
    if not (isinstance(origin.target, str) and isinstance(origin.stack, str)):
        raise ValueError("it names no model, or no layers")
    rows: Any = origin.head_rows
    missing = origin.heads is not None and not {"q", "k", "v"} <= set(rows)
    if missing or not all(type(count) is int and 0 < count < 2**16 for count in rows.values()):
        raise ValueError("its heads have no sizes")
    if (origin.heads is None) != (origin.kv_heads is None):
        raise ValueError("it says something of query heads or of key heads alone")
