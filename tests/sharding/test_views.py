"""Views and supports over any shape, number of ranks and mask: nothing is lost or doubled where shards cut."""

from __future__ import annotations

from math import ceil, prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trace_kernels.compact import compact_gather
from trace_kernels.runs import Runs

from trace_dist.masks.units import UnitLayout, unit_layout
from trace_dist.sharding.views import PartitionView, chunk_views, flat_views

shapes = st.lists(st.integers(1, 11), min_size=1, max_size=3).map(tuple)
worlds = st.integers(1, 9)
granularities = st.sampled_from(["element", "block", "row", "column", "head", "tensor"])


@st.composite
def cuts(draw: st.DrawFn, shape: tuple[int, ...]) -> list[PartitionView]:
    """A parameter cut as ZeRO-3 does (equal flat slices, the last one short) or as FSDP2 does (rows)."""
    world = draw(worlds)
    if draw(st.booleans()):
        return flat_views(prod(shape), ceil(prod(shape) / world), world)
    return chunk_views(shape, world)


@st.composite
def masked(draw: st.DrawFn) -> tuple[UnitLayout, Tensor, list[PartitionView]]:
    """A layout, some of its units, and the views of all ranks."""
    shape = draw(shapes)
    head_rows = draw(st.sampled_from([None, *(n for n in range(1, 4) if shape[0] % n == 0)]))
    layout = unit_layout(
        shape, draw(granularities), draw(st.integers(1, 5)), head_rows if len(shape) == 2 else None
    )
    chosen = draw(st.lists(st.booleans(), min_size=layout.num_units, max_size=layout.num_units))
    units = torch.tensor(chosen).nonzero().flatten().to(layout.index_dtype)
    return layout, units, draw(cuts(shape))


@given(st.data(), shapes)
@settings(deadline=None)
def test_views_tile_the_parameter(data: st.DataObject, shape: tuple[int, ...]) -> None:
    views = data.draw(cuts(shape))
    assert [index for view in views for index in range(view.start, view.stop)] == list(range(prod(shape)))


@given(shapes, worlds)
@settings(deadline=None)
def test_chunks_are_those_of_torch(shape: tuple[int, ...], world: int) -> None:
    chunks = torch.arange(prod(shape)).view(shape).chunk(world)
    views = chunk_views(shape, world)
    assert [chunk.flatten().tolist() for chunk in chunks] == [
        list(range(view.start, view.stop)) for view in views[: len(chunks)]
    ]
    assert all(len(view) == 0 for view in views[len(chunks) :])


@given(masked())
@settings(deadline=None)
def test_the_supports_of_all_ranks_are_the_mask(case: tuple[UnitLayout, Tensor, list[PartitionView]]) -> None:
    layout, units, views = case
    runs, block = layout.runs(units)
    parts = [Runs.clip(runs, block, view.start, view.stop, layout.numel) for view in views]
    elements = torch.cat([part.indices() + view.start for part, view in zip(parts, views, strict=True)])
    assert torch.equal(elements, layout.elements(units))
    assert sum(part.num_entries for part in parts) == int(layout.sizes(units).sum())
    for part, view in zip(parts, views, strict=True):
        inside = (elements >= view.start) & (elements < view.stop)
        assert part.num_entries == int(inside.sum())


@given(masked())
@settings(deadline=None)
def test_gathers_of_all_ranks_are_the_whole_gather(
    case: tuple[UnitLayout, Tensor, list[PartitionView]],
) -> None:
    """Compact tensors of the ranks, one behind the other, are the compact tensor of the whole parameter."""
    layout, units, views = case
    values = torch.randn(layout.numel, generator=torch.Generator().manual_seed(0))
    runs, block = layout.runs(units)
    parts = [
        compact_gather(
            values[view.start : view.stop], Runs.clip(runs, block, view.start, view.stop, layout.numel)
        )
        for view in views
    ]
    whole = compact_gather(values, Runs.clip(runs, block, 0, layout.numel, layout.numel))
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(whole, values[layout.elements(units)])


@pytest.mark.parametrize("world", [2, 3, 8])
def test_indices_beyond_two_to_the_31_survive_the_cut(world: int) -> None:
    """One unit of every size at each edge of a tensor of 2.8e9 elements; fp32 ends at 2^24, int32 at 2^31."""
    shape = (70_000, 40_001)
    numel = prod(shape)
    for granularity in ("element", "block", "row", "column"):
        layout = unit_layout(shape, granularity, 32, None)
        for views in (flat_views(numel, ceil(numel / world), world), chunk_views(shape, world)):
            edges = torch.tensor([view.stop - 1 for view in views if view.stop])
            units = layout.unit_of(edges).unique().to(layout.index_dtype)
            runs, block = layout.runs(units)
            parts = [Runs.clip(runs, block, view.start, view.stop, numel) for view in views]
            found = torch.cat([part.indices() + view.start for part, view in zip(parts, views, strict=True)])
            assert torch.equal(found, layout.elements(units))
