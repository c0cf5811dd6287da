"""Masks from scores, and how much two masks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from trace_dist.config.mask import FREE, Spread
from trace_dist.masks.layouts import layouts_for
from trace_dist.masks.mask import Mask, combine, random_mask
from trace_dist.masks.select import (
    Scores,
    Units,
    best_units,
    check_density,
    global_budgets,
    random_scores,
    tensor_seed,
)
from trace_dist.masks.tied import Tied
from trace_dist.masks.units import UnitLayout

__all__ = [
    "Scores",
    "combine",
    "compete",
    "layouts_for",
    "mask_from_scores",
    "overlap",
    "place",
    "random_mask",
    "random_scores",
    "tensor_seed",
    "union",
]


def place(
    layouts: Mapping[str, UnitLayout],
    granularity: str,
    budgets: Mapping[str, float],
    scores: Scores,
    refused: Units | None = None,
) -> Mask:
    """The mask of ``best_units``. Collective when ``scores`` is.

    Raises:
        ValueError: a score is not finite, or nothing is selected.
    """
    tied = Tied.of(layouts, granularity)
    units = best_units(tied.layouts, tied.budgets(budgets), tied.scores(scores), tied.refused(refused))
    return Mask(tied.written_out(units), layouts, granularity)


def mask_from_scores(
    scores: Mapping[str, Tensor],
    layouts: Mapping[str, UnitLayout],
    granularity: str,
    density: float,
    spread: Spread = FREE,
) -> Mask:
    """Keep the units with the highest scores; the units of all tensors compete.

    Args:
        scores: parameter -> [num_units] fp32 mean score per element of the unit.
        layouts: every maskable parameter.
        granularity: of the layouts.
        density: selected / maskable elements; met to half of the unit at the limit. Or tensors, as ``spread`` says.
        spread: what the density is a share of; least and greatest density of a tensor.

    Raises:
        ValueError: density out of range, a score that is not finite, or a selection of nothing.
    """
    check_density(density)
    return compete(layouts, granularity, density, lambda name, _: scores[name], spread)


def compete(
    layouts: Mapping[str, UnitLayout],
    granularity: str,
    density: float,
    scores: Scores,
    spread: Spread = FREE,
    refused: Units | None = None,
) -> Mask:
    """The best units of the whole model (``global_budgets``), with scores that are asked for. Collective when ``scores`` is.

    Raises:
        ValueError: a score is not finite, or nothing is selected.
    """
    tied = Tied.of(layouts, granularity)
    scores, refused = tied.scores(scores), tied.refused(refused)
    budgets = global_budgets(scores, tied.layouts, density, spread, refused)
    units = best_units(tied.layouts, budgets, scores, refused)
    return Mask(tied.written_out(units), layouts, granularity)


def union(masks: Sequence[Mask]) -> Mask:
    """All entries of masks of one model; where their granularities or maskable parameters differ, a mask of single elements.

    Raises:
        ValueError: the models differ.
    """
    first = masks[0]
    alike = all(
        mask.granularity == first.granularity and dict(mask.layouts) == dict(first.layouts) for mask in masks
    )
    return reduce(or_, masks if alike else _in_elements(masks))


def _in_elements(masks: Sequence[Mask]) -> Sequence[Mask]:
    """The same entries in units of one element, of all parameters that one of the masks may select from; masks of other shapes as
    they are."""
    layouts: dict[str, UnitLayout] = {}
    for mask in masks:
        for name, layout in mask.layouts.items():
            if layouts.setdefault(name, UnitLayout(layout.shape, 1)).shape != layout.shape:
                return masks
    return [
        Mask(
            {name: mask.elements(name).to(layouts[name].index_dtype) for name in mask},
            layouts,
            "element",
            mask.meta,
        )
        for mask in masks
    ]


def overlap(left: Mask, right: Mask) -> float:
    """Jaccard index over elements: |A and B| / |A or B|."""
    shared = 0
    for name in set(left.units) & set(right.units):
        a, b = left.units[name].long(), right.units[name].long()
        both = a[torch.isin(a, b)]
        shared += int(left.layouts[name].sizes(both).sum())
    return shared / (left.num_entries + right.num_entries - shared)
