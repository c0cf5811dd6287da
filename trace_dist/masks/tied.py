"""Units of several parameters that are selected together: a neuron's rows of gate and up, and its column of down.

[Note: neurons] For selection the parameters of one MLP are one, whose rows are its neurons: the score of a neuron is the mean
over its entries, its size that of all its parts. What was selected is then written out as units of each parameter, so masks,
deltas and optimizers know nothing of it. Where gate and up are one matrix [2 * neurons, in], a neuron has the rows i and
i + neurons of it. In a Conv1D, whose weight is [in, out], rows and columns change places (masks/layouts.py). Fused experts are
not tied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trace_dist.config.granularity import Granularities
from trace_dist.masks.select import Scores, Units
from trace_dist.masks.units import UnitLayout
from trace_dist.models.roles import ParamInfo, describe

PARTS = ("gate", "up", "gate_up", "down")
"""Roles of the matrices in which a neuron has rows or columns."""


@dataclass(frozen=True)
class Tied:
    """A model's parameters as a selection sees them.

    Attributes:
        own: the layouts of the parameters.
        layouts: the layouts that compete; a group has one, under the name of its first parameter.
        groups: that name -> the parameters of the group.
    """

    own: Mapping[str, UnitLayout]
    layouts: Mapping[str, UnitLayout]
    groups: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, layouts: Mapping[str, UnitLayout], granularity: str, family: str = "of this model") -> Tied:
        """By a granularity; nothing is tied where it is not ``neuron``.

        Raises:
            ValueError: a matrix of an MLP has neither a unit nor two for each of its neurons; names the ``family``.
        """
        if not Granularities.parse(granularity).neurons:
            return cls(layouts, layouts, {})
        groups, neurons = {}, {}
        for num, names in _mlps(layouts, family):
            if len(names) > 1:
                groups[names[0]], neurons[names[0]] = names, num
        taken = {name for names in groups.values() for name in names[1:]}
        merged = {}
        for name, layout in layouts.items():
            if name in groups:
                size = sum(layouts[each].numel for each in groups[name]) // neurons[name]
                merged[name] = UnitLayout((neurons[name], size), size)
            elif name not in taken:
                merged[name] = layout
        return cls(layouts, merged, groups)

    def scores(self, scores: Scores) -> Scores:
        """Scores of what competes, from those of each parameter's units. Collective where they are."""
        if not self.groups:
            return scores

        def tied(name: str, layout: UnitLayout) -> Tensor:
            if name not in self.groups:
                return scores(name, layout)
            sums = torch.zeros(layout.num_units, dtype=torch.float64)
            for each in self.groups[name]:
                parts = scores(each, self.own[each]).cpu().double().view(-1, layout.num_units)
                sums += self.own[each].unit * parts.sum(0)
            return (sums / layout.unit).float()

        return tied

    def budgets(self, budgets: Mapping[str, float]) -> dict[str, float]:
        """Elements of what competes."""
        return {
            name: sum(budgets.get(each, 0.0) for each in self.groups.get(name, (name,)))
            for name in self.layouts
            if any(each in budgets for each in self.groups.get(name, (name,)))
        }

    def refused(self, refused: Units | None) -> Units | None:
        """Units that may not be taken: a neuron of which any part may not."""
        if not refused or not self.groups:
            return refused
        found = {}
        for name in self.layouts:
            parts = [refused[each].long() for each in self.groups.get(name, (name,)) if each in refused]
            if parts:
                found[name] = (torch.cat(parts) % self.layouts[name].num_units).unique()
        return found

    def written_out(self, units: Units) -> dict[str, Tensor]:
        """The units of each parameter, in the model's order."""
        key_of = {each: name for name, names in self.groups.items() for each in names}
        found = {}
        for name, layout in self.own.items():
            key = key_of.get(name, name)
            if key in units:
                starts = range(0, layout.num_units, max(1, self.layouts[key].num_units))
                found[name] = torch.cat([units[key].long() + start for start in starts]).to(
                    layout.index_dtype
                )
        return found


def _mlps(layouts: Mapping[str, UnitLayout], family: str) -> list[tuple[int, tuple[str, ...]]]:
    """Of each MLP how many neurons it has, and its matrices, in their order. Raises ValueError as ``Tied.of``."""
    infos = describe({name: layout.shape for name, layout in layouts.items()})
    around: dict[str, list[str]] = {}
    for name, layout in layouts.items():
        # Those of fused experts have no lines.
        if infos[name].role in PARTS and layout.lines is not None:
            around.setdefault(_around(name), []).append(name)
    return [
        group
        for place, names in around.items()
        for group in _grouped({name: layouts[name].num_units for name in names}, place, family, infos)
    ]


def _grouped(
    sizes: Mapping[str, int], place: str, family: str, infos: Mapping[str, ParamInfo]
) -> list[tuple[int, tuple[str, ...]]]:
    """The matrices of one place by their number of neurons: that of ``down``, where it is there."""
    down = {num for name, num in sizes.items() if infos[name].role == "down"}
    groups: dict[int, list[str]] = {}
    for name, num in sizes.items():
        fused = bool(down) and num not in down and num // 2 in down and num % 2 == 0
        groups.setdefault(num // 2 if fused else num, []).append(name)
    alone = [name for name, num in sizes.items() if down and num not in down and num // 2 not in down]
    if alone:
        raise ValueError(
            f"mask.granularity='neuron': the MLP {place} of the family {family} cannot be tied, {alone[0]} has {sizes[alone[0]]} "
            f"units where down has {min(down)} neurons; use row, or column for the role down"
        )
    return [(num, tuple(names)) for num, names in groups.items()]


def _around(name: str) -> str:
    """The module of an MLP; BERT's has each matrix in a module of its own."""
    path = name.split(".")
    return ".".join(path[: -3 if path[-2:-1] == ["dense"] else -2])
