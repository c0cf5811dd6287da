"""Selection where some units are refused, beside dense references at odd sizes."""

from __future__ import annotations

import pytest
import torch

from trace_dist.masks import UnitLayout
from trace_dist.masks.ops import place, random_mask
from trace_dist.masks.room import fit, free_elements

LAYOUTS = {"a": UnitLayout((7, 13), 1), "b": UnitLayout((5, 9), 1), "c": UnitLayout((11,), 1)}


def drawn(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(layout.num_units, generator=generator) for name, layout in LAYOUTS.items()}


def refused_units(share: float) -> dict[str, torch.Tensor]:
    return {name: (scores < share).nonzero().flatten().int() for name, scores in drawn(1).items()}


@pytest.mark.parametrize("share", [0.2, 0.7, 0.9])
def test_the_next_best_are_taken(share: float) -> None:
    """Nothing refused is taken, the number is exact, and in each tensor the free units taken are the best free ones."""
    refused, scores = refused_units(share), drawn(2)
    budgets = {"a": 6.4, "b": 4.2, "c": 0.4}
    mask = place(LAYOUTS, "element", budgets, lambda name, _: scores[name], refused)
    assert mask.num_entries == 11
    for name, layout in LAYOUTS.items():
        free = torch.ones(layout.num_units, dtype=torch.bool)
        free[refused[name].long()] = False
        taken = mask.dense(name).flatten()
        assert not bool((taken & ~free).any())
        best = scores[name].where(free, torch.tensor(-1.0)).argsort(descending=True)[: int(taken.sum())]
        assert set(best.tolist()) == set(taken.nonzero().flatten().tolist())
        if share < 0.5:
            assert abs(int(taken.sum()) - budgets[name]) < 1


def test_a_full_tensor_passes_its_budget_on() -> None:
    """The budget of a tensor without room goes to the others, in proportion to theirs; the sum stays."""
    refused = {"a": torch.arange(90, dtype=torch.int32)}
    assert free_elements(LAYOUTS, refused) == {"a": 1, "b": 45, "c": 11}
    found = fit({"a": 19.0, "b": 10.0, "c": 5.0}, LAYOUTS, refused)
    assert found == pytest.approx({"a": 1.0, "b": 22.0, "c": 11.0})
    scores = drawn(3)
    mask = place(LAYOUTS, "element", {"a": 20.0}, lambda name, _: scores[name], refused)
    assert mask.num_entries == 20
    assert mask.units["a"].tolist() == [90]


def test_all_the_room_can_be_taken() -> None:
    refused = refused_units(0.5)
    room = sum(free_elements(LAYOUTS, refused).values())
    budgets = {"a": float(room), "b": 0.0, "c": 0.0}
    scores = drawn(4)
    mask = place(LAYOUTS, "element", budgets, lambda name, _: scores[name], refused)
    assert mask.num_entries == room


def test_ragged_units() -> None:
    """Blocks of 4 in rows of 9: the last of each row has one element."""
    layouts = {"w": UnitLayout((6, 9), 4)}
    refused = {"w": torch.tensor([0, 1, 4, 17], dtype=torch.int32)}
    scores = torch.linspace(1, 0, 18)
    mask = place(layouts, "block", {"w": 9.0}, lambda *_: scores, refused)
    # sizes of units 2, 3 and 5 are 1, 4 and 1; unit 6 brings ten
    assert mask.units["w"].tolist() == [2, 3, 5, 6]


def test_random_masks_beside_each_other_fill_the_model() -> None:
    taken: dict[str, torch.Tensor] = {}
    total = sum(layout.numel for layout in LAYOUTS.values())
    for seed in range(4):
        mask = random_mask(LAYOUTS, "element", 0.25, seed, taken)
        assert mask.num_entries in (total // 4, total // 4 + 1)
        for name, units in mask.units.items():
            joined = torch.cat([taken.get(name, units[:0]), units])
            assert len(joined.unique()) == len(joined)
            taken[name] = joined.sort().values
    assert random_mask(LAYOUTS, "element", 0.25, 9) == random_mask(LAYOUTS, "element", 0.25, 9, {})
