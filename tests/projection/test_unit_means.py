"""Unit scores of a model in slices: parts of units that an edge cuts add up to the whole."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from probe.setting import make_model

from trace_dist.masks import UnitLayout
from trace_dist.masks.ops import layouts_for, place
from trace_dist.projection.placements.magnitude import magnitude_scores
from trace_dist.projection.placements.random import seeded_scores
from trace_dist.projection.unit_means import reduce_units
from trace_dist.sharding.single import SingleModel
from trace_dist.sharding.views import PartitionView


class Slice(SingleModel):
    """One rank's part of a model, cut at fixed places, in this process (tests/probe does it on real ranks)."""

    def __init__(self, module: torch.nn.Module, rank: int, edges: list[int]) -> None:
        super().__init__(module)
        self.rank, self._edges = rank, edges

    def views(self, name: str) -> list[PartitionView]:
        numel = self._parameters[name].numel()
        cuts = [0, *(min(edge, numel) for edge in self._edges), numel]
        return [PartitionView(a, b) for a, b in itertools.pairwise(cuts)]


class Weight(torch.nn.Module):
    """A module that is one matrix."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(6, 10, generator=generator))


@given(st.lists(st.integers(0, 60), min_size=1, max_size=3), st.sampled_from([1, 3, 4, 10, 20, 60]))
@settings(deadline=None)
def test_parts_of_units_add_up(edges: list[int], unit: int) -> None:
    layout = UnitLayout((6, 10), unit)
    module = Weight()
    slices = [Slice(module, rank, sorted(edges)) for rank in range(len(edges) + 1)]
    flat = module.weight.detach().flatten()
    expected = [float(flat[layout.elements(torch.tensor([u]))].abs().mean()) for u in range(layout.num_units)]
    by_place = sum(magnitude_scores(each)("weight", layout) for each in slices)
    assert by_place.tolist() == pytest.approx(expected)

    # The same from sums over the units that a rank touches.
    total = torch.zeros(layout.num_units)
    for each in slices:
        view = each.views("weight")[each.rank]
        if len(view):
            units, position = layout.unit_of(torch.arange(view.start, view.stop)).unique(return_inverse=True)
            sums = torch.zeros(len(units)).index_add_(0, position, each.local("weight").abs())
            total += reduce_units(each, "weight", layout, sums, units, by_unit=True)
    assert total.tolist() == pytest.approx(expected)


def test_values_at_some_places_alone() -> None:
    model = SingleModel(Weight())
    layout = UnitLayout((6, 10), 10)
    scores = reduce_units(model, "weight", layout, torch.tensor([5.0, 15.0]), torch.tensor([3, 40]))
    assert scores.tolist() == [0.5, 0, 0, 0, 1.5, 0]


def test_random_places_depend_on_seed_and_tensor_alone() -> None:
    model = make_model()
    layouts = layouts_for(model, "block", 16, "linear")
    budgets = {name: 0.3 * layout.numel for name, layout in layouts.items()}
    first = place(layouts, "block", budgets, seeded_scores(1))
    assert first == place(layouts, "block", budgets, seeded_scores(1))
    assert first != place(layouts, "block", budgets, seeded_scores(2))
    gates = [first.units[f"model.layers.{layer}.mlp.gate_proj.weight"].tolist() for layer in range(2)]
    assert gates[0] != gates[1]
