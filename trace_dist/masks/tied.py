"""Units of several parameters that are selected together: a neuron's rows of gate and up, and its column of down.

[Note: neurons] For selection the parameters of one MLP are one, whose rows are its neurons: the score of a neuron is the mean
over its entries, its size that of all its parts. What was selected is then written out as units of each parameter, so masks,
deltas and optimizers know nothing of it. Fused experts are not tied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trace_dist.config.granularity import NEURON, Granularities
from trace_dist.masks.select import Scores, Units
from trace_dist.masks.units import UnitLayout
from trace_dist.models.roles import describe

_PARTS = ("gate", "up", "down")


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
    def of(cls, layouts: Mapping[str, UnitLayout], granularity: str) -> Tied:
        """By a granularity; nothing is tied where it is not ``neuron``."""
        if NEURON not in Granularities.parse(granularity).all:
            return cls(layouts, layouts, {})
        groups = {names[0]: names for names in _mlps(layouts) if len(names) > 1}
        taken = {name for names in groups.values() for name in names[1:]}
        merged = {}
        for name, layout in layouts.items():
            if name in groups:
                size = sum(layouts[each].unit for each in groups[name])
                merged[name] = UnitLayout((layout.num_units, size), size)
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
                sums += self.own[each].unit * scores(each, self.own[each]).cpu().double()
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
                found[name] = torch.cat(parts).unique()
        return found

    def written_out(self, units: Units) -> dict[str, Tensor]:
        """The units of each parameter, in the model's order."""
        key_of = {each: name for name, names in self.groups.items() for each in names}
        return {
            name: units[key_of.get(name, name)].to(layout.index_dtype)
            for name, layout in self.own.items()
            if key_of.get(name, name) in units
        }


def _mlps(layouts: Mapping[str, UnitLayout]) -> list[tuple[str, ...]]:
    """The matrices of each MLP that have one unit for each of its neurons."""
    infos = describe({name: layout.shape for name, layout in layouts.items()})
    found: dict[tuple[str, int], list[str]] = {}
    for name, layout in layouts.items():
        if infos[name].role in _PARTS and layout.lines == (
            "columns" if infos[name].role == "down" else "rows"
        ):
            around = name.rsplit(".", 2)[0]
            found.setdefault((around, layout.num_units), []).append(name)
    return [tuple(names) for names in found.values()]
