"""Choosing units: functions from scores and layouts to unit dictionaries, parameter name -> sorted unit indices.

Selection keeps an exact number of elements, from scores in fp32 (scores in bf16 tie, and a threshold on ties
selects everything or nothing).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import floor
from typing import Literal

import torch
from torch import Tensor

from trace_dist.config.mask import FREE, Spread
from trace_dist.masks.room import fit
from trace_dist.masks.units import UnitLayout

SetOperation = Literal["union", "intersection", "difference"]
Scores = Callable[[str, UnitLayout], Tensor]
"""(parameter, layout) -> [num_units] fp32 mean score per element, equal on every rank. May be collective."""
Units = Mapping[str, Tensor]
"""Parameter name -> sorted unique unit indices, [k] in the layout's index dtype; only parameters with k > 0."""


def check_density(density: float) -> None:
    """Raise ValueError unless the density lies in (0, 1]."""
    if not 0 < density <= 1:
        raise ValueError(f"mask.density={density!r}: must lie in (0, 1]; use for example 0.05")


def tensor_seed(seed: int, name: str) -> int:
    """A seed that differs between parameters, so that tensors of one shape get different random masks."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "little")


def random_scores(name: str, layout: UnitLayout, seed: int) -> Tensor:
    """Uniform fp32 scores per unit, [num_units], the same on every rank."""
    generator = torch.Generator().manual_seed(tensor_seed(seed, name))
    return torch.rand(layout.num_units, generator=generator)


def top_units(
    scores: Tensor, layout: UnitLayout, num_elements: float, refused: Tensor | None = None
) -> Tensor:
    """The best units of one tensor, as many as come nearest to ``num_elements`` elements.

    Args:
        scores: [num_units] fp32, finite.
        layout: the parameter's layout.
        num_elements: budget in elements; the last unit is taken when at least half of it fits.
        refused: unique units that may not be taken; the next best are taken.

    Returns:
        Sorted unit indices in the layout's index dtype. Ties go to the lower index, so every rank agrees.

    Raises:
        ValueError: a score is not finite.
    """
    _check_scores(scores)
    num_free = layout.num_units
    if refused is not None:
        num_free -= len(refused)
        scores = scores.index_fill(0, refused.long(), -torch.inf)
    if layout.ragged:
        order = torch.argsort(scores, descending=True, stable=True)[:num_free]
        chosen = order[: _num_fitting(layout.sizes(order), num_elements)].sort().values
    else:
        wanted = max(0, floor(num_elements / layout.unit + 0.5))
        chosen = _largest(scores, min(wanted, num_free)).nonzero().flatten()
    return chosen.to(layout.index_dtype)


def _largest(scores: Tensor, num: int) -> Tensor:
    """Where the ``num`` largest scores are, ties to the lower index: [n] bool. Linear in n; sorting takes ten times as long."""
    if num < 1 or num >= len(scores):
        return torch.full(scores.shape, num > 0, device=scores.device)
    limit = scores.kthvalue(len(scores) - num + 1).values
    chosen = scores > limit
    ties = (scores == limit).nonzero().flatten()
    chosen[ties[: num - int(chosen.sum())]] = True
    return chosen


def _num_fitting(sizes: Tensor, num_elements: float) -> int:
    """How many units, taken in order, come nearest to ``num_elements``. In integers: fp32 ends at 2^24."""
    return int((2 * torch.cumsum(sizes, 0) - sizes <= floor(2 * num_elements)).sum())


def _check_scores(scores: Tensor) -> None:
    if scores.dtype != torch.float32:
        raise AssertionError(f"scores are {scores.dtype}, not float32")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("scores: NaN or infinite; the probe diverged: lower probe.lr")


def best_units(
    layouts: Mapping[str, UnitLayout],
    budgets: Mapping[str, float],
    scores: Scores,
    refused: Units | None = None,
) -> dict[str, Tensor]:
    """The best-scored units of every tensor under per-tensor budgets. Collective when ``scores`` is.

    What rounding to whole units leaves of one budget is carried to the next tensor that has one, so the total is met to half a
    unit also where a tensor's own budget is less than a unit.

    Args:
        layouts: every maskable parameter.
        budgets: elements per parameter.
        scores: unit scores of one parameter.
        refused: units that may not be taken. The next best of the same tensor are, and other tensors take what a tensor has no
            room for; no more than the room is taken.

    Raises:
        ValueError: a score is not finite.
    """
    units, carry = {}, 0.0
    if refused:
        budgets = fit(budgets, layouts, refused)
    else:
        refused = {}
    for name, layout in layouts.items():
        budget = budgets.get(name, 0.0)
        if budget <= 0:
            continue
        chosen = top_units(scores(name, layout), layout, budget + carry, refused.get(name))
        carry += budget - int(layout.sizes(chosen).sum())
        if len(chosen):
            units[name] = chosen
    return units


def random_units(
    layouts: Mapping[str, UnitLayout],
    density: float,
    seed: int,
    refused: Units | None = None,
    spread: Spread = FREE,
) -> dict[str, Tensor]:
    """Random units at the same density in every tensor, as far as whole units allow; of whole tensors, random ones."""
    check_density(density)

    def scores(name: str, layout: UnitLayout) -> Tensor:
        return random_scores(name, layout, seed)

    if spread.share_of == "tensors":
        budgets = global_budgets(scores, layouts, density, spread, refused)
        return best_units(layouts, budgets, scores, refused)
    order = list(layouts)
    if all(layout.num_units == 1 for layout in layouts.values()):
        # What is carried on decides which tensors are taken; in the model's order these are the same for every seed.
        order.sort(key=lambda name: float(scores(name, layouts[name])))
    budgets = {name: density * layouts[name].numel for name in order}
    units = best_units({name: layouts[name] for name in order}, budgets, scores, refused)
    return {name: units[name] for name in layouts if name in units}


def global_budgets(
    scores: Scores,
    layouts: Mapping[str, UnitLayout],
    density: float,
    spread: Spread = FREE,
    refused: Units | None = None,
) -> dict[str, float]:
    """Elements that each tensor receives when the units of all tensors compete for ``density``. Collective when ``scores`` is.

    Exact, by counting: the scores of one tensor at a time are held, and each is asked for three times. Units are taken from the
    best one on while at least half of the next one fits. Ties go to the earlier tensor and the lower index.

    Args:
        scores: unit scores of one parameter.
        layouts: every maskable parameter.
        density: share of all elements, or of all tensors.
        spread: what the density is a share of; least and greatest density of a tensor.
        refused: units that may not be taken.

    Raises:
        ValueError: a score is not finite.
    """
    by_count = spread.share_of == "tensors"
    total = sum(layout.num_units if by_count else layout.numel for layout in layouts.values())
    contest = _Contest(scores, layouts, spread, refused or {}, by_count)
    limit = floor(2 * density * total)
    high, above = _crossing(contest.histogram(lambda keys: keys >> 16), 0, limit)
    if high < 0:
        return contest.taken(BARRED, above, limit)
    inside = contest.histogram(lambda keys: torch.where(keys >> 16 == high, keys & 0xFFFF, -1))
    low, above = _crossing(inside, above, limit)
    return contest.taken((high << 16) + low, above, limit)


FORCED = 1 << 32
"""Key of the units that a tensor's floor keeps; above every score's."""
BARRED = -1
"""Key of units that may not be taken."""


@dataclass(frozen=True)
class _Contest:
    """The units of all tensors, ordered by integer keys, with their weights: elements, or one each."""

    scores: Scores
    layouts: Mapping[str, UnitLayout]
    spread: Spread
    refused: Units
    by_count: bool

    def histogram(self, bins: Callable[[Tensor], Tensor]) -> Tensor:
        """Weight of the units in each bin, [2^16 + 1] fp64; those of a negative bin are left out."""
        found = torch.zeros((FORCED >> 16) + 1, dtype=torch.float64)
        for name, layout in self.layouts.items():
            numbers = bins(self._keys(name, layout))
            inside = (numbers >= 0).nonzero().flatten()
            weights = self._weights(layout, inside).double()
            found += torch.bincount(numbers[inside], weights=weights, minlength=len(found))
        return found

    def taken(self, key: int, above: float, limit: int) -> dict[str, float]:
        """Elements of each tensor in the units above a key, and in those that tie with it, in order, while they fit."""
        found, total = {}, int(above)
        for name, layout in self.layouts.items():
            keys = self._keys(name, layout)
            ties = ((keys == key) & (keys != BARRED)).nonzero().flatten()
            weights = self._weights(layout, ties)
            fitting = 2 * (weights.cumsum(0) + total) - weights <= limit
            total += int(weights.sum())
            chosen = torch.cat([(keys > key).nonzero().flatten(), ties[fitting]])
            found[name] = float(layout.sizes(chosen).sum())
        return found

    def _weights(self, layout: UnitLayout, units: Tensor) -> Tensor:
        return torch.ones_like(units) if self.by_count else layout.sizes(units)

    def _keys(self, name: str, layout: UnitLayout) -> Tensor:
        """Integers in the order of the scores: [num_units] int64 in [0, 2^32), FORCED or BARRED."""
        scores, refused, spread = self.scores(name, layout).cpu(), self.refused.get(name), self.spread
        _check_scores(scores)
        bits = (scores + 0.0).contiguous().view(torch.int32).long()  # -0 ties with 0
        keys = torch.where(bits < 0, ~(bits & 0x7FFFFFFF) + (1 << 31), bits + (1 << 31))
        if spread.cap < 1:
            allowed = top_units(scores, layout, spread.cap * layout.numel, refused).long()
            keys = torch.full_like(keys, BARRED).index_copy_(0, allowed, keys[allowed])
        if spread.floor > 0:
            keys[top_units(scores, layout, spread.floor * layout.numel, refused).long()] = FORCED
        if refused is not None:
            keys[refused.long()] = BARRED
        return keys


def _crossing(weights: Tensor, above: float, limit: int) -> tuple[int, float]:
    """The highest bin that does not fit whole, -1 where all do, and the weight above it.

    Args:
        weights: of the bins, [n] fp64.
        above: weight above all of them.
        limit: twice what there is room for.
    """
    sums = weights.flip(0).cumsum(0) + above
    full = int((2 * sums <= limit).sum())
    crossing = len(weights) - 1 - full
    return crossing, above if full == 0 else float(sums[full - 1])


def combined_units(
    left: Units, right: Units, layouts: Mapping[str, UnitLayout], operation: SetOperation
) -> dict[str, Tensor]:
    """Union, intersection or difference, parameter by parameter."""
    units = {}
    for name, layout in layouts.items():
        a = left.get(name, torch.empty(0, dtype=torch.int64)).long()
        b = right.get(name, torch.empty(0, dtype=torch.int64)).long()
        if operation == "union":
            chosen = torch.cat([a, b]).unique()
        elif operation == "intersection":
            chosen = a[torch.isin(a, b)]
        else:
            chosen = a[~torch.isin(a, b)]
        if len(chosen):
            units[name] = chosen.to(layout.index_dtype)
    return units
