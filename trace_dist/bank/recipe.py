"""A task as a recipe over earlier ones: some hundred bytes that say what it began with, beside its own part.

    W = base + sum over parts j and groups g of  a_jg (delta_j - base) on the weights of g,   then the task's own values

A task that began with a combination of earlier deltas (``bank.composition``) may be kept so: ``delta.safetensors`` holds its own
entries alone, ``recipe.json`` the scalars. The sum is formed by the same operations as when the task was trained (``mixed``), so
both forms hold the same bits. Parts are named by the checksums of their files, so tasks may be renamed and banks merged; what a
recipe needs cannot be removed. The base's weights must be at hand to read it: they are nowhere in a bank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from sys import float_info
from typing import Any

import torch
from torch import Tensor

from trace_dist.bank.delta import Delta, check_dtype, extract_delta
from trace_dist.masks.mask import Mask
from trace_dist.models.roles import Role, role_of
from trace_dist.sharding.base import ShardedModel
from trace_dist.utils.files import readable, sha256
from trace_dist.utils.sealed import check_version, read_record, write_record

FORMAT, VERSION = "trace_dist.recipe", 1
GROUPS = ("attention", "mlp", "other")
"""Weights that share a scalar."""
_GROUP_OF: dict[Role, str] = {
    **dict.fromkeys(("q", "k", "v", "qkv", "o"), "attention"),
    **dict.fromkeys(("gate", "up", "gate_up", "down"), "mlp"),
}
CURE = "restore it from a copy"


@dataclass(frozen=True)
class Part:
    """An earlier task in a recipe.

    Attributes:
        delta: SHA-256 of the file of its delta.
        scalars: group of weights -> how much of the delta; all groups.
        recipe: SHA-256 of its own recipe; None where it has none.
    """

    delta: str
    scalars: Mapping[str, float]
    recipe: str | None = None

    @property
    def key(self) -> tuple[str, str | None]:
        """Which task of a bank it is: checksums of its delta and recipe."""
        return self.delta, self.recipe


@dataclass(frozen=True)
class Recipe:
    """What a task began with, in the order in which it adds up."""

    parts: tuple[Part, ...]

    def save(self, path: Path) -> None:
        """Write the file (docs/formats.md), whole or not at all."""
        parts = [
            {"delta": part.delta, "scalars": dict(part.scalars)}
            | ({"recipe": part.recipe} if part.recipe else {})
            for part in self.parts
        ]
        write_record(path, {"format": FORMAT, "version": VERSION, "parts": parts})

    @classmethod
    def load(cls, path: Path, digest: str | None = None) -> Recipe:
        """Read a recipe.

        Args:
            path: the file.
            digest: SHA-256 of the file, where it is known.

        Raises:
            ValueError: missing, damaged, not a recipe, or of a newer version.
        """
        found = read_record(path, CURE)
        if digest is not None:
            with readable(path, "recipe"):
                written = sha256(path) == digest
            if not written:
                raise ValueError(
                    f"{path}: damaged recipe (its bytes are not those that were written); {CURE}"
                )
        if found.get("format") != FORMAT:
            raise ValueError(f"{path}: this is no recipe of a task; {CURE}")
        check_version(found.get("version"), path, VERSION)
        parts = found.get("parts")
        if not isinstance(parts, list) or not parts:
            raise ValueError(f"{path}: damaged recipe (it names no task); {CURE}")
        return cls(tuple(_part(part, path) for part in parts))


def _part(value: Any, path: Path) -> Part:
    if isinstance(value, dict):
        delta, scalars, recipe = value.get("delta"), value.get("scalars"), value.get("recipe")
        named = isinstance(delta, str) and isinstance(recipe, str | None)
        if named and isinstance(scalars, dict) and set(scalars) == set(GROUPS):
            numbers = {group: scalars[group] for group in GROUPS}
            # NaN is not below anything, and an integer of JSON may be too large for a float.
            if all(
                type(number) in (int, float) and abs(number) <= float_info.max for number in numbers.values()
            ):
                return Part(str(delta), {group: float(number) for group, number in numbers.items()}, recipe)
    raise ValueError(f"{path}: damaged recipe (a task of it is {value!r:.200}); {CURE}")


def group_of(name: str) -> str:
    """The group of a parameter."""
    return _GROUP_OF.get(role_of(name), "other")


def taken(masks: Sequence[Mask], shares: Sequence[Mapping[str, float]]) -> Mask | None:
    """The entries that a combination changes: those of the weights of which it takes a share that is not 0; None where there are
    none.

    Args:
        masks: of earlier tasks.
        shares: of each, group of weights -> scalar.

    Raises:
        ValueError: the masks are of another model or granularity.
    """
    changed = []
    for mask, row in zip(masks, shares, strict=True):
        names = [name for name in mask if row[group_of(name)]]
        if len(names) == len(mask):
            changed.append(mask)
        elif names:
            units = {name: mask.units[name] for name in names}
            changed.append(Mask(units, mask.layouts, mask.granularity, mask.meta))
    return reduce(or_, changed) if changed else None


def change_of(tuned: Tensor, base: Tensor) -> Tensor:
    """What a delta changes of some entries: fp32, or fp64 of an fp64 model."""
    wide = torch.promote_types(base.dtype, torch.float32)
    return tuned.to(base.device, wide) - base.to(wide)


def mixed(base: Tensor, changes: Iterable[tuple[Tensor, Tensor, float]]) -> Tensor:
    """Base plus shares of changes, in their order; a share of 0 leaves every bit.

    Args:
        base: [n] values.
        changes: of each: [k] int64 places in ``base``, [k] changes (``change_of``), its share.

    Returns:
        [n] in the dtype of ``base``.
    """
    new = base.to(torch.promote_types(base.dtype, torch.float32), copy=True)
    for places, change, share in changes:
        if share:
            new[places] += share * change
    return new.to(base.dtype)


def prepared(recipe: Recipe, parts: Sequence[Delta], own: Delta, base: ShardedModel) -> Delta:
    """The whole delta of a task that is kept as a recipe. Collective.

    Args:
        recipe: of the task.
        parts: the whole deltas of its parts, in order.
        own: its own part, which shares no entry with what they change.
        base: the model, holding the base's values.

    Raises:
        ValueError: the parts are of another model, granularity or dtype, or they share entries with the own part.
    """
    begun = taken([part.mask for part in parts], [part.scalars for part in recipe.parts])
    if begun is None:
        return own
    start = extract_delta(base, begun, own.task)
    combined = {}
    for name in begun:
        changes, entries, mine = [], begun.elements(name), start.values[name]
        for part, delta in zip(recipe.parts, parts, strict=True):
            share = part.scalars[group_of(name)]
            if share and name in delta.mask.units:
                check_dtype(delta, name, mine.dtype)
                places = torch.searchsorted(entries, delta.mask.elements(name))
                changes.append((places, change_of(delta.values[name], mine[places]), share))
        combined[name] = mixed(mine, changes)
    return _joined(own, Delta(begun, combined, own.task))


def _joined(own: Delta, begun: Delta) -> Delta:
    """The own part and what the task began with, as one delta."""
    mask = (own.mask | begun.mask).with_meta(**own.mask.meta)
    if mask.num_entries != own.mask.num_entries + begun.mask.num_entries:
        raise ValueError(
            f"delta {own.task!r}: its own part shares entries with its recipe's; learn the task again"
        )
    values = {}
    for name in mask:
        entries = mask.elements(name)
        held = [delta for delta in (own, begun) if name in delta.mask.units]
        found = torch.empty(len(entries), dtype=held[0].values[name].dtype)
        for delta in held:
            check_dtype(delta, name, found.dtype)
            found[torch.searchsorted(entries, delta.mask.elements(name))] = delta.values[name]
        values[name] = found
    return Delta(mask, values, own.task)
