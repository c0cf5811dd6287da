"""``exclusive``: an entry belongs to the first task that trains it. Later tasks are refused it, and take the next best.

A unit of several entries is refused when one of them is taken, so masks of different granularities do not mix either.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from trace_dist.config import MaskConfig
from trace_dist.config.checks import check
from trace_dist.continual.isolation.base import Isolation
from trace_dist.masks.mask import Mask
from trace_dist.masks.select import Units
from trace_dist.masks.units import UnitLayout


class Exclusive(Isolation):
    """Disjoint masks."""

    label = "exclusive entries"
    disjoint = True

    def check(self, mask: MaskConfig, num_tasks: int) -> None:
        rule = f"{num_tasks} tasks of mask.density={mask.share} have no room beside each other"
        cure = f"lower mask.density to {1 / num_tasks:.3g} at most, or set soft or shared"
        check(num_tasks * mask.share <= 1 + 1e-9, "mask.isolation", mask.isolation, rule, cure)

    def refused(self, layouts: Mapping[str, UnitLayout], earlier: Iterable[Mask]) -> Units:
        taken: dict[str, Tensor] = {}
        for mask in earlier:
            for name in set(mask.units).intersection(layouts):
                layout = layouts[name]
                same = layout == mask.layouts[name]
                units = mask.units[name].long() if same else layout.unit_of(mask.elements(name))
                taken[name] = torch.cat([taken[name], units]).unique() if name in taken else units.unique()
        return taken


ISOLATION = Exclusive
