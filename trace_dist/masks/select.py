"""Choosing units: functions from scores and layouts to unit dictionaries, parameter name -> sorted unit indices.

Selection keeps an exact number of elements, from scores in fp32 (scores in bf16 tie, and a threshold on ties
selects everything or nothing).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from math import floor
from typing import Literal

import torch
from torch import Tensor

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
    if scores.dtype != torch.float32:
        raise AssertionError(f"scores are {scores.dtype}, not float32")
    _check_finite(scores)
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


def _check_finite(scores: Tensor) -> None:
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
    layouts: Mapping[str, UnitLayout], density: float, seed: int, refused: Units | None = None
) -> dict[str, Tensor]:
    """Random units at the same density in every tensor, as far as whole units allow."""
    check_density(density)
    budgets = {name: density * layout.numel for name, layout in layouts.items()}
    return best_units(layouts, budgets, lambda name, layout: random_scores(name, layout, seed), refused)


def global_budgets(
    scores: Mapping[str, Tensor], layouts: Mapping[str, UnitLayout], density: float
) -> dict[str, float]:
    """Elements each tensor receives when the units of all tensors compete for ``density``."""
    flat = torch.cat([scores[name] for name in layouts])
    _check_finite(flat)
    target = density * sum(layout.numel for layout in layouts.values())
    units = {layout.unit for layout in layouts.values()}
    if len(units) == 1 and not any(layout.ragged for layout in layouts.values()):
        chosen = _largest(flat, floor(target / units.pop() + 0.5))
    else:
        sizes = torch.cat([layout.sizes(torch.arange(layout.num_units)) for layout in layouts.values()])
        order = torch.argsort(flat, descending=True, stable=True)
        chosen = torch.zeros(len(flat), dtype=torch.bool)
        chosen[order[: _num_fitting(sizes[order], target)]] = True
    parts = chosen.split([layout.num_units for layout in layouts.values()])
    return {
        name: float(layout.sizes(part.nonzero()).sum())
        for (name, layout), part in zip(layouts.items(), parts, strict=True)
    }


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
