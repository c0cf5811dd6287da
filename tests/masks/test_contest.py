"""The units of all tensors compete: exact against a ranking by hand, also with floors, caps, refusals, and tensors by count."""

from __future__ import annotations

from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_dist.config import MaskConfig
from trace_dist.config.mask import Spread
from trace_dist.masks import UnitLayout
from trace_dist.masks.ops import compete, mask_from_scores, random_mask
from trace_dist.masks.select import global_budgets, top_units

LAYOUTS = {
    "a": UnitLayout((6, 8), 4),
    "ragged": UnitLayout((5, 11), 4),
    "vector": UnitLayout((7,), 1),
    "columns": UnitLayout((3, 5), 3, 5),
}
WHOLE = {
    f"t{i}": UnitLayout((rows, 3), rows * 3) for i, rows in enumerate((5, 1, 9, 2, 2, 7, 3, 11, 4, 6, 13))
}
Scores = dict[str, torch.Tensor]


def drawn(layouts: dict[str, UnitLayout], seed: int, ties: bool) -> Scores:
    """Of both signs and of many magnitudes; with ties, of five values alone, zeros of both signs among them."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, layout in layouts.items():
        if ties:
            values = torch.tensor([-1.5, -0.0, 0.0, 1e-30, 2.0])
            found[name] = values[torch.randint(5, (layout.num_units,), generator=generator)]
        else:
            sizes = 10 ** (60 * torch.rand(layout.num_units, generator=generator) - 30)
            found[name] = sizes * torch.randn(layout.num_units, generator=generator).sign()
    return found


def ranked(
    scores: Scores, layouts: dict[str, UnitLayout], density: float, by_count: bool, refused: Scores
) -> set:
    """(tensor, unit) of the best, from the best one on while half of the next one fits; ties to the earlier one."""
    units = [(name, i) for name, layout in layouts.items() for i in range(layout.num_units)]
    sizes = {(n, i): 1 if by_count else int(layouts[n].sizes(torch.tensor([i]))) for n, i in units}
    free = [(n, i) for n, i in units if i not in refused.get(n, torch.empty(0)).tolist()]
    room, total, chosen = floor(2 * density * sum(sizes.values())), 0, set()
    for unit in sorted(free, key=lambda unit: -float(scores[unit[0]][unit[1]])):
        if 2 * total + sizes[unit] > room:
            break
        total += sizes[unit]
        chosen.add(unit)
    return chosen


def selected(units: dict[str, torch.Tensor]) -> set:
    return {(name, i) for name, chosen in units.items() for i in chosen.tolist()}


@given(st.floats(0.05, 1.0), st.integers(0, 50), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=60)
def test_the_best_units_of_the_model_are_taken(density: float, seed: int, ties: bool, refuse: bool) -> None:
    scores = drawn(LAYOUTS, seed, ties)
    refused = {"a": torch.tensor([0, 5]), "columns": torch.arange(5)} if refuse else {}
    expected = ranked(scores, LAYOUTS, density, False, refused)
    budgets = global_budgets(lambda name, _: scores[name], LAYOUTS, density, refused=refused)
    sizes = {n: sum(int(LAYOUTS[n].sizes(torch.tensor([i]))) for m, i in expected if m == n) for n in LAYOUTS}
    assert budgets == sizes
    if expected:
        mask = compete(LAYOUTS, "block", density, lambda name, _: scores[name], refused=refused)
        assert selected(mask.units) == expected


@given(st.floats(0.05, 1.0), st.integers(0, 50), st.booleans())
@settings(deadline=None, max_examples=30)
def test_a_share_of_the_tensors_is_a_number_of_them(density: float, seed: int, ties: bool) -> None:
    scores, spread = drawn(WHOLE, seed, ties), Spread("tensors")
    refused = {"t2": torch.tensor([0])}
    for left_out in ({}, refused):
        expected = ranked(scores, WHOLE, density, True, left_out)
        if expected:
            mask = compete(WHOLE, "tensor", density, lambda name, _: scores[name], spread, left_out)
            assert selected(mask.units) == expected
            assert len(mask) == min(floor(density * len(WHOLE) + 0.5), len(WHOLE) - len(left_out))


def test_by_count_a_large_tensor_counts_as_a_small_one() -> None:
    layouts = {"large": UnitLayout((40, 10), 400), "small": UnitLayout((3,), 3), "other": UnitLayout((5,), 5)}
    scores = {"large": torch.tensor([3.0]), "small": torch.tensor([2.0]), "other": torch.tensor([1.0])}
    assert list(mask_from_scores(scores, layouts, "tensor", 0.34, Spread("tensors"))) == ["large"]
    assert list(mask_from_scores(scores, layouts, "tensor", 0.6, Spread("tensors"))) == ["large", "small"]
    # Of the elements a third is less than half of the large one: nothing is left to train.
    with pytest.raises(ValueError, match="selects nothing"):
        mask_from_scores(scores, layouts, "tensor", 0.34)


@given(st.integers(0, 30))
@settings(deadline=None, max_examples=20)
def test_floors_and_caps_hold_and_the_rest_competes(seed: int) -> None:
    layouts = {"a": UnitLayout((6, 8), 1), "b": UnitLayout((5, 11), 1), "c": UnitLayout((7,), 1)}
    scores = drawn(layouts, seed, False)
    mask = mask_from_scores(scores, layouts, "element", 0.4, Spread(floor=0.2, cap=0.6))
    assert mask.num_entries == 44  # of 110
    counts = {
        name: (round(0.2 * layout.numel), round(0.6 * layout.numel)) for name, layout in layouts.items()
    }
    inside = {}
    for name, (least, most) in counts.items():
        order = scores[name].argsort(descending=True).tolist()
        taken = mask.units[name].tolist()
        assert least <= len(taken) <= most
        assert sorted(order[: len(taken)]) == taken  # the best of its tensor
        inside[name] = (len(taken), [float(scores[name][i]) for i in order])
    # Nobody outside is better than somebody inside, but for floors and caps.
    best_out = max((s[n] for name, (n, s) in inside.items() if n < counts[name][1]), default=-torch.inf)
    worst_in = min((s[n - 1] for name, (n, s) in inside.items() if n > counts[name][0]), default=torch.inf)
    assert worst_in >= best_out


def test_within_each_tensor_the_same_share_is_taken() -> None:
    layouts = {"a": UnitLayout((6, 8), 1), "b": UnitLayout((5, 11), 1)}
    scores = {"a": torch.rand(48), "b": 100 + torch.rand(55)}
    spread = MaskConfig(density=0.25, scope="tensor").spread
    mask = mask_from_scores(scores, layouts, "element", 0.25, spread)
    assert {name: len(units) for name, units in mask.units.items()} == {"a": 12, "b": 14}
    for name, units in mask.units.items():
        assert torch.equal(units, top_units(scores[name], layouts[name], 0.25 * layouts[name].numel))


@pytest.mark.parametrize("spread", [Spread(), Spread("tensors")], ids=["elements", "tensors"])
def test_random_whole_tensors_differ_with_the_seed(spread: Spread) -> None:
    """In the model's order the same tensors would come first for every seed."""
    masks = [random_mask(WHOLE, "tensor", 0.3, seed, spread=spread) for seed in range(6)]
    assert len({mask.digest() for mask in masks}) > 3
    assert all(
        mask == random_mask(WHOLE, "tensor", 0.3, seed, spread=spread) for seed, mask in enumerate(masks)
    )
    for mask in masks:
        if spread.share_of == "tensors":
            assert len(mask) == 3
        else:
            assert abs(mask.num_entries - 0.3 * mask.num_maskable) <= 39 / 2
