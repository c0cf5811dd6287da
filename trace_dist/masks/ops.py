"""Making and combining masks.

Selection keeps an exact number of elements, from scores in fp32 (scores in bf16 tie, and a threshold on ties
selects everything or nothing).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from trace_dist.masks.format import Mask
from trace_dist.masks.units import UnitLayout, unit_size
from trace_dist.models.roles import describe, head_layout, maskable

SetOperation = Literal["union", "intersection", "difference"]


def layouts_for(model: Any, granularity: str, block: int, maskable_spec: str) -> dict[str, UnitLayout]:
    """Unit layouts of a model's maskable parameters.

    Args:
        model: a transformers model, or a sharded model (its ``module`` is described).
        granularity: element, block, row, head or tensor.
        block: elements per unit for block.
        maskable_spec: ``linear``, ``all`` or a regular expression (``models.roles.maskable``).

    Raises:
        ValueError: nothing is maskable.
    """
    module = getattr(model, "module", model)
    infos = describe(module)
    return {
        name: UnitLayout(
            infos[name].shape,
            unit_size(infos[name].shape, granularity, block, head_layout(module.config, infos[name])),
        )
        for name in maskable(module, maskable_spec)
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


def top_units(scores: Tensor, layout: UnitLayout, num_elements: int) -> Tensor:
    """The best units of one tensor that together hold at most ``num_elements`` elements.

    Args:
        scores: [num_units] fp32, finite.
        layout: the parameter's layout.
        num_elements: budget in elements; a budget of half a unit or more is worth one unit.

    Returns:
        Sorted unit indices in the layout's index dtype. Ties go to the lower index, so every rank agrees.

    Raises:
        ValueError: a score is not finite.
    """
    if scores.dtype != torch.float32:
        raise AssertionError(f"scores are {scores.dtype}, not float32")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("scores: NaN or infinite; the probe diverged: lower probe.lr")
    if layout.ragged:
        order = torch.argsort(scores, descending=True, stable=True)
        keep = int((torch.cumsum(layout.sizes(order), 0) <= max(num_elements, layout.unit // 2)).sum())
    else:
        keep = min(int(num_elements / layout.unit + 0.5), layout.num_units)
        order = torch.argsort(scores, descending=True, stable=True)
    return order[:keep].sort().values.to(layout.index_dtype)


def mask_from_scores(
    scores: Mapping[str, Tensor],
    layouts: Mapping[str, UnitLayout],
    granularity: str,
    density: float,
    budgets: Mapping[str, float] | None = None,
) -> Mask:
    """Keep the units with the highest scores.

    Args:
        scores: parameter -> [num_units] fp32 mean score per element of the unit.
        layouts: every maskable parameter.
        granularity: of the layouts.
        density: selected / maskable elements; exact to less than one unit.
        budgets: parameter -> elements to select there; without it the units of all tensors compete.

    Raises:
        ValueError: density out of range, no scores, or a selection of nothing.
    """
    check_density(density)
    if budgets is None:
        budgets = global_budgets(scores, layouts, density)
    units = {}
    for name in layouts:
        if budgets.get(name, 0) > 0:
            chosen = top_units(scores[name], layouts[name], round(budgets[name]))
            if len(chosen):
                units[name] = chosen
    return Mask(units, layouts, granularity)


def global_budgets(
    scores: Mapping[str, Tensor], layouts: Mapping[str, UnitLayout], density: float
) -> dict[str, float]:
    """Elements each tensor receives when the units of all tensors compete for ``density``."""
    names = list(layouts)
    sizes = torch.cat([layouts[name].sizes(torch.arange(layouts[name].num_units)) for name in names])
    flat = torch.cat([scores[name] for name in names])
    if not bool(torch.isfinite(flat).all()):
        raise ValueError("scores: NaN or infinite; the probe diverged: lower probe.lr")
    target = density * float(sum(layouts[name].numel for name in names))
    order = torch.argsort(flat, descending=True, stable=True)
    chosen = order[torch.cumsum(sizes[order], 0) <= target + 0.5]
    owner = torch.repeat_interleave(
        torch.arange(len(names)), torch.tensor([layouts[name].num_units for name in names])
    )
    totals = torch.zeros(len(names), dtype=torch.int64).index_add_(0, owner[chosen], sizes[chosen])
    return {name: float(total) for name, total in zip(names, totals, strict=True)}


def random_mask(layouts: Mapping[str, UnitLayout], granularity: str, density: float, seed: int) -> Mask:
    """A random mask with the same density in every tensor (tensors too small for one unit stay empty)."""
    check_density(density)
    budgets = {name: density * layout.numel for name, layout in layouts.items()}
    scores = {name: random_scores(name, layout, seed) for name, layout in layouts.items()}
    return mask_from_scores(scores, layouts, granularity, density, budgets).with_meta(
        method="random", seed=seed
    )


def combine(left: Mask, right: Mask, operation: SetOperation) -> Mask:
    """Union, intersection or difference of two masks of one model.

    Raises:
        ValueError: granularity or layouts differ, or nothing is left.
    """
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
    return Mask(units, left.layouts, left.granularity, {"model": left.meta.get("model"), "method": operation})


def overlap(left: Mask, right: Mask) -> float:
    """Jaccard index over elements: |A and B| / |A or B|."""
    shared = 0
    for name in set(left.units) & set(right.units):
        a, b = left.units[name].long(), right.units[name].long()
        both = a[torch.isin(a, b)]
        shared += int(left.layouts[name].sizes(both).sum())
    return shared / (left.num_entries + right.num_entries - shared)
