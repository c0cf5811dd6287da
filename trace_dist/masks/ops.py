"""Making and combining masks.

Selection keeps an exact number of elements, from scores in fp32 (scores in bf16 tie, and a threshold on ties
selects everything or nothing).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from math import floor, prod
from typing import Any, Literal

import torch
from torch import Tensor

from trace_dist.masks.format import Mask
from trace_dist.masks.units import UnitLayout, unit_layout
from trace_dist.models.heads import head_rows
from trace_dist.models.roles import describe, maskable

SetOperation = Literal["union", "intersection", "difference"]
Scores = Callable[[str, UnitLayout], Tensor]
"""(parameter, layout) -> [num_units] fp32 mean score per element, equal on every rank. May be collective."""


def layouts_for(model: Any, granularity: str, block: int, maskable_spec: str) -> dict[str, UnitLayout]:
    """Unit layouts of a model's maskable parameters; parameters without elements have none.

    Args:
        model: a transformers model, or a sharded model (its ``module`` is described).
        granularity: element, block, row, column, head or tensor.
        block: elements per unit for block.
        maskable_spec: ``linear``, ``all`` or a regular expression (``models.roles.maskable``).

    Raises:
        ValueError: nothing is maskable; for ``head``, the size of a weight's heads is not known.
    """
    module = getattr(model, "module", model)
    infos = describe(module)
    by_head = granularity == "head"
    return {
        name: unit_layout(
            infos[name].shape, granularity, block, head_rows(module, infos[name]) if by_head else None
        )
        for name in maskable(module, maskable_spec)
        if prod(infos[name].shape)
    }


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


def top_units(scores: Tensor, layout: UnitLayout, num_elements: float) -> Tensor:
    """The best units of one tensor, as many as come nearest to ``num_elements`` elements.

    Args:
        scores: [num_units] fp32, finite.
        layout: the parameter's layout.
        num_elements: budget in elements; the last unit is taken when at least half of it fits.

    Returns:
        Sorted unit indices in the layout's index dtype. Ties go to the lower index, so every rank agrees.

    Raises:
        ValueError: a score is not finite.
    """
    if scores.dtype != torch.float32:
        raise AssertionError(f"scores are {scores.dtype}, not float32")
    _check_finite(scores)
    if layout.ragged:
        order = torch.argsort(scores, descending=True, stable=True)
        chosen = order[: _num_fitting(layout.sizes(order), num_elements)].sort().values
    else:
        chosen = _largest(scores, max(0, floor(num_elements / layout.unit + 0.5))).nonzero().flatten()
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


def place(
    layouts: Mapping[str, UnitLayout], granularity: str, budgets: Mapping[str, float], scores: Scores
) -> Mask:
    """The mask with the best-scored units of every tensor under per-tensor budgets. Collective when ``scores`` is.

    What rounding to whole units leaves of one budget is carried to the next tensor that has one, so the total is met to half a
    unit also where a tensor's own budget is less than a unit.

    Args:
        layouts: every maskable parameter.
        granularity: of the layouts.
        budgets: elements per parameter.
        scores: unit scores of one parameter.

    Raises:
        ValueError: a score is not finite, or nothing is selected.
    """
    units, carry = {}, 0.0
    for name, layout in layouts.items():
        budget = budgets.get(name, 0.0)
        if budget <= 0:
            continue
        chosen = top_units(scores(name, layout), layout, budget + carry)
        carry += budget - int(layout.sizes(chosen).sum())
        if len(chosen):
            units[name] = chosen
    return Mask(units, layouts, granularity)


def mask_from_scores(
    scores: Mapping[str, Tensor], layouts: Mapping[str, UnitLayout], granularity: str, density: float
) -> Mask:
    """Keep the units with the highest scores; the units of all tensors compete.

    Args:
        scores: parameter -> [num_units] fp32 mean score per element of the unit.
        layouts: every maskable parameter.
        granularity: of the layouts.
        density: selected / maskable elements; met to half of the unit at the limit.

    Raises:
        ValueError: density out of range, a score that is not finite, or a selection of nothing.
    """
    check_density(density)
    budgets = global_budgets(scores, layouts, density)
    return place(layouts, granularity, budgets, lambda name, _: scores[name])


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


def random_mask(layouts: Mapping[str, UnitLayout], granularity: str, density: float, seed: int) -> Mask:
    """A random mask with the same density in every tensor, as far as whole units allow."""
    check_density(density)
    budgets = {name: density * layout.numel for name, layout in layouts.items()}
    mask = place(layouts, granularity, budgets, lambda name, layout: random_scores(name, layout, seed))
    return mask.with_meta(method="random", seed=seed)


def combine(left: Mask, right: Mask, operation: SetOperation) -> Mask:
    """Union, intersection or difference of two masks of one model.

    Raises:
        ValueError: granularity, layouts or models differ, or nothing is left.
    """
    models = {mask.meta["model"] for mask in (left, right) if mask.meta.get("model") is not None}
    if len(models) > 1:
        raise ValueError(
            f"mask: the two masks were made for the models {' and '.join(sorted(models))}; combine masks of one model"
        )
    if left.granularity != right.granularity or dict(left.layouts) != dict(right.layouts):
        raise ValueError("mask: the two masks differ in granularity or shapes; combine masks of one model")
    units = {}
    for name in left.layouts:
        a = left.units.get(name, torch.empty(0, dtype=torch.int64)).long()
        b = right.units.get(name, torch.empty(0, dtype=torch.int64)).long()
        if operation == "union":
            chosen = torch.cat([a, b]).unique()
        elif operation == "intersection":
            chosen = a[torch.isin(a, b)]
        else:
            chosen = a[~torch.isin(a, b)]
        if len(chosen):
            units[name] = chosen.to(left.layouts[name].index_dtype)
    return Mask(
        units, left.layouts, left.granularity, {"model": next(iter(models), None), "method": operation}
    )


def overlap(left: Mask, right: Mask) -> float:
    """Jaccard index over elements: |A and B| / |A or B|."""
    shared = 0
    for name in set(left.units) & set(right.units):
        a, b = left.units[name].long(), right.units[name].long()
        both = a[torch.isin(a, b)]
        shared += int(left.layouts[name].sizes(both).sum())
    return shared / (left.num_entries + right.num_entries - shared)
