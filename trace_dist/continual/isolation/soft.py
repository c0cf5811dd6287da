"""``soft``: the more earlier tasks need an entry, the smaller the steps that a later one takes there.

    need_i   = sum over earlier tasks t of |change_t,i| / mean of |change_t| over the entries of t's mask
    factor_i = 1 / (1 + strength * need_i)

``change_t,i`` is how far task t moved entry i. An entry that one earlier task moved as far as its entries on average has need 1,
and steps of half the size where the strength is 1. The factor is on AdamW's learning rate, weight decay included.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trace_dist.config.checks import Section
from trace_dist.continual.isolation.base import Change, Isolation
from trace_dist.masks.mask import Mask
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Options(Section):
    """Of ``soft``."""

    section: ClassVar[str] = "mask.isolation_options"

    strength: float = 1.0
    """How much an earlier task's need slows an entry, in 1 / need; an entry of average need takes 1 / (1 + strength) steps."""

    def check(self) -> None:
        self.positive("strength")


class Soft(Isolation):
    """Smaller steps where earlier tasks need an entry."""

    label = "smaller steps on needed entries"
    reads_changes = True

    def scale(self, mask: Mask, changes: Iterable[Change]) -> dict[str, Tensor] | None:
        needs: dict[str, Tensor] = {}
        for change in changes:
            _add(needs, mask, change)
        if not needs:
            return None
        strength: float = self.options.strength
        factors = {name: (1 / (1 + strength * need)).float() for name, need in needs.items()}
        slowed = torch.cat([factor[factor < 1] for factor in factors.values()])
        logger.info(
            "soft isolation: %d of %d entries take smaller steps, %.2f of the usual size on average",
            len(slowed),
            mask.num_entries,
            float(slowed.mean()) if len(slowed) else 1.0,
        )
        return factors


def _add(needs: dict[str, Tensor], mask: Mask, change: Change) -> None:
    """Add a task's need of a mask's entries, where it has any: parameter -> [entries] fp64."""
    total = sum(float(values.double().sum()) for values in change.values.values())
    if total == 0:
        return
    mean = total / sum(len(values) for values in change.values.values())
    for name in set(mask.units).intersection(change.mask.units):
        mine, theirs = mask.elements(name), change.mask.elements(name)
        places = torch.searchsorted(theirs, mine).clamp(max=len(theirs) - 1)
        common = theirs[places] == mine
        if bool(common.any()):
            need = needs.setdefault(name, torch.zeros(len(mine), dtype=torch.float64))
            need[common] += change.values[name].double()[places[common]] / mean


ISOLATION = Soft
