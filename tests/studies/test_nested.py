"""Masks of several densities from one selection."""

from __future__ import annotations

import pytest
import torch

from trace_dist.masks import UnitLayout
from trace_dist.masks.ops import compete
from trace_dist.studies.nested import nested_masks

SHAPES = ((12, 10), (7, 9), (5, 30))


@pytest.mark.parametrize("unit", [1, 4])
@pytest.mark.parametrize("ties", [False, True])
def test_they_are_those_of_single_selections(unit: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    layouts = {str(shape): UnitLayout(shape, unit) for shape in SHAPES}
    scores = {name: torch.rand(layout.num_units, generator=generator) for name, layout in layouts.items()}
    if ties:
        scores = {name: (4 * values).round() for name, values in scores.items()}
    kind = "element" if unit == 1 else "block"
    found = nested_masks(layouts, kind, [0.02, 0.1, 0.4], lambda name, _: scores[name])
    for density, mask in found.items():
        alone = compete(layouts, kind, density, lambda name, _: scores[name])
        # Units of unequal length at the limit: one more or one less.
        if unit == 1:
            assert mask == alone
        assert abs(mask.num_entries - alone.num_entries) <= unit
        assert mask.density == pytest.approx(density, abs=unit / 330)
