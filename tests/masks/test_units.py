"""Layouts: the units of a parameter tile it, whatever its shape."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_dist.masks.units import UnitLayout, unit_layout

shapes = st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple)


@st.composite
def layouts(draw: st.DrawFn) -> UnitLayout:
    """Units inside a row (ragged where they do not divide it), of whole rows, the whole tensor, or columns."""
    shape = draw(shapes)
    if len(shape) > 1 and draw(st.booleans()):
        return UnitLayout(shape, shape[-2], shape[-1])
    numel, cols = prod(shape), shape[-1] if shape else 1
    rows = numel // cols
    whole_rows = [n * cols for n in range(1, rows + 1) if rows % n == 0]
    return UnitLayout(shape, draw(st.sampled_from([*range(1, cols + 1), *whole_rows])))


@given(layouts())
@settings(deadline=None)
def test_units_tile_the_parameter(layout: UnitLayout) -> None:
    units = torch.arange(layout.num_units)
    assert torch.equal(layout.elements(units), torch.arange(layout.numel))
    assert int(layout.sizes(units).sum()) == layout.numel


@given(layouts())
@settings(deadline=None)
def test_unit_of_is_the_inverse_of_elements(layout: UnitLayout) -> None:
    units = torch.arange(layout.num_units)
    for unit, size in zip(units, layout.sizes(units), strict=True):
        elements = layout.elements(unit[None])
        assert len(elements) == size
        assert bool((layout.unit_of(elements) == unit).all())


@given(layouts())
@settings(deadline=None)
def test_a_unit_never_leaves_its_row_unless_it_is_whole_rows_or_a_column(layout: UnitLayout) -> None:
    for unit in range(layout.num_units):
        elements = layout.elements(torch.tensor([unit]))
        rows = (elements // layout.cols).unique()
        if layout.stride > 1:
            matrices = torch.arange(layout.numel).view(-1, layout.unit, layout.cols)
            assert torch.equal(elements, matrices[unit // layout.cols, :, unit % layout.cols])
        elif layout.unit <= layout.cols:
            assert len(rows) == 1
        else:
            assert len(elements) == len(rows) * layout.cols


@given(layouts(), st.data())
@settings(deadline=None)
def test_a_selection_has_the_elements_of_its_units(layout: UnitLayout, data: st.DataObject) -> None:
    chosen = data.draw(st.sets(st.integers(0, layout.num_units - 1), min_size=1))
    units = torch.tensor(sorted(chosen), dtype=layout.index_dtype)
    expected = [e for e in range(layout.numel) if int(layout.unit_of(torch.tensor(e))) in chosen]
    assert layout.elements(units).tolist() == expected
    assert layout.elements(units, len(expected)).tolist() == expected
    runs, block = layout.runs(units)
    assert (runs.long()[:, None] * block + torch.arange(block)).flatten().tolist() == expected


@given(layouts(), st.data())
@settings(deadline=None)
def test_the_range_of_units_near_an_interval(layout: UnitLayout, data: st.DataObject) -> None:
    """Every unit that the interval touches, and for contiguous units no other."""
    start = data.draw(st.integers(0, layout.numel))
    stop = data.draw(st.integers(start, layout.numel))
    touched = set(layout.unit_of(torch.arange(start, stop)).tolist())
    near = set(layout.unit_range(start, stop))
    assert touched <= near
    assert near == touched or layout.stride > 1
    assert near <= set(range(layout.num_units))


@pytest.mark.parametrize(
    ("shape", "unit", "sizes"),
    [((2, 10), 4, [4, 4, 2, 4, 4, 2]), ((4, 3), 6, [6, 6]), ((7,), 3, [3, 3, 1]), ((2, 2, 3), 12, [12])],
)
def test_sizes(shape: tuple[int, ...], unit: int, sizes: list[int]) -> None:
    layout = UnitLayout(shape, unit)
    assert layout.sizes(torch.arange(layout.num_units)).tolist() == sizes


@pytest.mark.parametrize(("shape", "unit"), [((4, 3), 5), ((4, 3), 9), ((4, 3), 24), ((4, 3), 0)])
def test_a_unit_that_does_not_tile_is_refused(shape: tuple[int, ...], unit: int) -> None:
    with pytest.raises(ValueError, match=rf"^unit={unit}: .*; use"):
        UnitLayout(shape, unit)


@pytest.mark.parametrize(
    ("shape", "unit", "stride"), [((4, 3), 3, 3), ((4, 3), 4, 4), ((7,), 1, 7), ((4, 3), 2, 2)]
)
def test_a_stride_that_is_not_a_columns_is_refused(shape: tuple[int, ...], unit: int, stride: int) -> None:
    with pytest.raises(ValueError, match=rf"^stride={stride}: .*; use stride 1"):
        UnitLayout(shape, unit, stride)


def test_indices_beyond_two_to_the_31() -> None:
    """A tensor of 2.8e9 elements: int64 units, and no arithmetic in between that wraps or rounds."""
    large = UnitLayout((70_000, 40_001), 1)
    last = large.num_units - 1
    assert large.index_dtype == torch.int64
    assert large.elements(torch.tensor([last])).tolist() == [70_000 * 40_001 - 1]
    assert large.unit_of(torch.tensor([last])).tolist() == [last]
    ragged = UnitLayout((70_000, 40_001), 32)
    assert ragged.index_dtype == torch.int32
    units = torch.tensor([ragged.num_units - 1], dtype=torch.int32)
    assert ragged.elements(units).tolist() == [70_000 * 40_001 - 1]
    assert ragged.runs(units)[0].dtype == torch.int64
    assert ragged.unit_of(torch.tensor([70_000 * 40_001 - 1])).tolist() == [ragged.num_units - 1]
    columns = UnitLayout((70_000, 40_001), 70_000, 40_001)
    assert columns.index_dtype == torch.int32
    elements = columns.runs(torch.tensor([40_000], dtype=torch.int32))[0]
    assert elements[-1] == 70_000 * 40_001 - 1
    assert columns.unit_of(elements[-1:]).tolist() == [40_000]
    assert UnitLayout((2**16, 2**15), 1).index_dtype == torch.int64
    assert UnitLayout((2**16, 2**15), 2).index_dtype == torch.int32


@pytest.mark.parametrize(
    ("granularity", "shape", "head_rows", "unit", "stride"),
    [
        ("element", (6, 8), 2, 1, 1),
        ("block", (6, 8), 2, 4, 1),
        ("block", (6, 3), None, 3, 1),
        ("row", (6, 8), 2, 8, 1),
        ("head", (6, 8), 2, 16, 1),
        ("head", (6, 8), None, 8, 1),
        ("tensor", (6, 8), 2, 48, 1),
        ("tensor", (7,), None, 7, 1),
        ("row", (7,), None, 1, 1),
        ("block", (7,), None, 1, 1),
        ("row", (2, 6, 8), None, 8, 1),
        ("element", (), None, 1, 1),
        ("column", (6, 8), 2, 6, 8),
        ("column", (2, 6, 8), None, 6, 8),
        ("column", (6, 1), None, 6, 1),
        ("column", (7,), None, 1, 1),
    ],
)
def test_the_layout_of_a_granularity(
    granularity: str, shape: tuple[int, ...], head_rows: int | None, unit: int, stride: int
) -> None:
    assert unit_layout(shape, granularity, 4, head_rows) == UnitLayout(shape, unit, stride)


def test_an_unknown_granularity_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^mask\.granularity='diagonal': unknown; use element"):
        unit_layout((6, 8), "diagonal", 4, None)
