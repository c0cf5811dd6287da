"""Selection keeps an exact number; set operators agree with boolean algebra on dense masks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from trace_dist.masks import Mask, UnitLayout
from trace_dist.masks.ops import combine, layouts_for, mask_from_scores, overlap, place, random_mask, union
from trace_dist.masks.select import global_budgets, random_scores, top_units

GRANULARITIES = ("element", "block", "row", "column", "head", "tensor")
SHAPES = {"a": (6, 8), "b": (5, 10), "c": (7,)}


def scores_of(layouts: dict[str, UnitLayout], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(layout.num_units, generator=generator) for name, layout in layouts.items()}


@given(st.integers(1, 12), st.integers(0, 60), st.integers(0, 5))
@settings(deadline=None)
def test_top_units_are_the_best_and_as_many_as_fit_best(unit: int, budget: int, seed: int) -> None:
    layout = UnitLayout((5, 12), unit)
    scores = torch.randint(0, 4, (layout.num_units,), generator=torch.Generator().manual_seed(seed)).float()
    chosen = top_units(scores, layout, budget)
    # Reference: walk down the ranking (ties: lower index first) while at least half of the next unit fits.
    expected: list[int] = []
    total = 0
    for index in sorted(range(layout.num_units), key=lambda i: (-float(scores[i]), i)):
        size = int(layout.sizes(torch.tensor([index])))
        if 2 * (budget - total) < size:
            break
        expected.append(index)
        total += size
    assert chosen.tolist() == sorted(expected)
    assert abs(total - budget) <= unit / 2


def test_a_short_budget_does_not_take_two_short_units() -> None:
    """Rows of 10 in units of 8: the best two units are the short ones of two rows, of 2 elements each."""
    layout = UnitLayout((2, 10), 8)
    scores = torch.tensor([0.1, 0.9, 0.2, 0.8])
    assert top_units(scores, layout, 2).tolist() == [1]
    assert top_units(scores, layout, 0).tolist() == []
    assert top_units(scores, layout, 4).tolist() == [1, 3]


def test_ties_go_to_the_lower_index_and_the_count_stays_exact() -> None:
    layout = UnitLayout((100, 100), 1)
    assert top_units(torch.zeros(10_000), layout, 37).tolist() == list(range(37))


def test_exact_beyond_two_to_the_24_elements() -> None:
    """Where fp32 counts and ``torch.quantile`` end (pitfalls 6 and 7); the last of many ties is found too."""
    num = 2**24 + 3
    layouts = {"w": UnitLayout((num,), 1)}
    scores = torch.zeros(num)
    scores[::5] = 1
    assert global_budgets(lambda *_: scores, layouts, (num - 2) / num) == {"w": num - 2}
    assert torch.equal(top_units(scores, layouts["w"], num - 2), torch.arange(num - 2, dtype=torch.int32))


def test_scores_tied_in_bf16_are_told_apart_in_fp32() -> None:
    """Updates of bf16 weights are multiples of one spacing: a threshold keeps all or nothing (pitfall 3)."""
    layout = UnitLayout((1000,), 1)
    scores = 1 + torch.randperm(1000, generator=torch.Generator().manual_seed(0)).float() * 1e-6
    assert len(scores.bfloat16().unique()) == 1
    assert torch.equal(top_units(scores, layout, 50), scores.topk(50).indices.sort().values.int())
    with pytest.raises(AssertionError, match="bfloat16, not float32"):
        top_units(scores.bfloat16(), layout, 50)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(bad: float, layouts: dict[str, UnitLayout]) -> None:
    scores = scores_of(layouts)
    scores["ragged"][3] = bad
    with pytest.raises(ValueError, match=r"^scores: NaN or infinite; .*lower probe\.lr"):
        mask_from_scores(scores, layouts, "block", 0.5)


@given(st.floats(0.02, 1.0), st.sampled_from([1, 3, 4, 8]), st.integers(0, 3))
@settings(deadline=None)
def test_tensors_compete_and_the_density_is_exact_to_less_than_a_unit(
    density: float, unit: int, seed: int
) -> None:
    layouts = {"a": UnitLayout((6, 8), unit), "b": UnitLayout((5, 10), unit), "c": UnitLayout((20,), 1)}
    scores = scores_of(layouts, seed)
    if density * 118 < unit:
        return
    mask = mask_from_scores(scores, layouts, "block", density)
    assert abs(mask.num_entries - density * mask.num_maskable) < unit
    kept = torch.cat([scores[name][units.long()] for name, units in mask.units.items()])
    out = torch.cat([s[~torch.isin(torch.arange(len(s)), mask.units.get(n, torch.empty(0)))]
                     for n, s in scores.items()])  # fmt: skip
    assert not len(out) or kept.min() >= out.max()


def test_selection_of_elements_equals_dense_top_k() -> None:
    layouts = {"a": UnitLayout((30, 40), 1), "b": UnitLayout((7, 11), 1)}
    scores = scores_of(layouts)
    mask = mask_from_scores(scores, layouts, "element", 0.05)
    flat = torch.cat([scores["a"], scores["b"]])
    dense = torch.zeros(len(flat), dtype=torch.bool)
    dense[flat.topk(round(0.05 * len(flat))).indices] = True
    assert torch.equal(torch.cat([mask.dense("a").flatten(), mask.dense("b").flatten()]), dense)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("density", [0.05, 0.2, 1.0])
def test_random_masks_of_a_model(granularity: str, density: float, tiny: LlamaForCausalLM) -> None:
    mask = Mask.random(tiny, density, granularity, seed=1, block=16)
    largest = max(layout.unit for layout in mask.layouts.values())
    assert abs(mask.num_entries - density * mask.num_maskable) < largest
    assert mask.granularity == granularity
    assert mask.meta["method"] == "random"
    assert mask == Mask.random(tiny, density, granularity, seed=1, block=16)
    if density < 1 and granularity in ("element", "block"):
        assert mask != Mask.random(tiny, density, granularity, seed=2, block=16)
        for name in mask.layouts:  # uniform: every tensor gets its share
            layout = mask.layouts[name]
            assert abs(mask.tensor_density(name) - density) * layout.numel <= layout.unit


def test_random_masks_of_layers_with_one_shape_differ(tiny: LlamaForCausalLM) -> None:
    """One seed reused per tensor would select the same places in every layer (pitfall 10)."""
    mask = Mask.random(tiny, 0.2)
    gates = [mask.dense(f"model.layers.{layer}.mlp.gate_proj.weight").flatten() for layer in range(2)]
    ups = mask.dense("model.layers.0.mlp.up_proj.weight").flatten()
    for a, b in ((gates[0], gates[1]), (gates[0], ups)):
        both = int((a & b).sum())
        assert abs(both / len(a) - 0.04) < 0.02  # independent: 20 % of 20 %


def test_random_scores_depend_on_name_and_seed_alone() -> None:
    layout = UnitLayout((4, 5), 1)
    torch.manual_seed(1)
    first = random_scores("w", layout, 0)
    torch.manual_seed(2)
    assert torch.equal(first, random_scores("w", layout, 0))
    assert not torch.equal(first, random_scores("w", layout, 1))
    assert not torch.equal(first, random_scores("v", layout, 0))


def test_layouts_of_a_model(tiny: LlamaForCausalLM) -> None:
    linear = layouts_for(tiny, "head", 16, "linear")
    assert len(linear) == 14
    assert linear["model.layers.0.self_attn.q_proj.weight"] == UnitLayout((36, 36), 12 * 36)
    assert linear["model.layers.0.mlp.down_proj.weight"] == UnitLayout((36, 50), 50)
    every = layouts_for(tiny, "element", 16, "all")
    assert "model.embed_tokens.weight" in every
    assert "lm_head.weight" not in every  # tied: one storage, masked once
    assert sum(layout.numel for layout in every.values()) == sum(p.numel() for p in tiny.parameters())


def test_a_parameter_without_elements_is_left_out(tiny: LlamaForCausalLM) -> None:
    tiny.register_parameter("empty", torch.nn.Parameter(torch.empty(0, 4)))
    assert "empty" not in layouts_for(tiny, "tensor", 16, "all")


@pytest.mark.parametrize("density", [0, -0.1, 1.5, float("nan")])
def test_densities_out_of_range_are_refused(density: float, layouts: dict[str, UnitLayout]) -> None:
    for make in (
        lambda: random_mask(layouts, "block", density, 0),
        lambda: mask_from_scores(scores_of(layouts), layouts, "block", density),
    ):
        with pytest.raises(ValueError, match=r"^mask\.density=.*must lie in \(0, 1\]; use"):
            make()


def test_a_density_of_less_than_half_a_unit_is_refused(layouts: dict[str, UnitLayout]) -> None:
    with pytest.raises(ValueError, match="selects nothing"):
        random_mask(layouts, "block", 1e-3, 0)


def test_what_rounding_leaves_is_carried_on() -> None:
    """Ten tensors of 8 units each, a budget of 0.3 units each: three units, not none."""
    layouts = {f"t{i}": UnitLayout((8, 10), 10) for i in range(10)}
    scores = scores_of(layouts)
    mask = place(layouts, "row", dict.fromkeys(layouts, 3.0), lambda name, _: scores[name])
    assert mask.num_entries == 30
    assert all(len(units) == 1 for units in mask.units.values())


def test_a_tensor_without_a_budget_stays_empty() -> None:
    layouts = {f"t{i}": UnitLayout((8, 10), 10) for i in range(3)}
    scores = scores_of(layouts)
    mask = place(layouts, "row", {"t0": 4.0, "t1": 0.0, "t2": 6.0}, lambda name, _: scores[name])
    assert list(mask.units) == ["t2"]


LAYOUTS = {
    "a": UnitLayout((6, 8), 4),
    "b": UnitLayout((5, 10), 4),
    "c": UnitLayout((7,), 1),
    "d": UnitLayout((2, 3, 4), 3, 4),
}


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    units = {}
    for name, layout in LAYOUTS.items():
        chosen = sorted(draw(st.sets(st.integers(0, layout.num_units - 1))))
        if chosen:
            units[name] = torch.tensor(chosen, dtype=torch.int32)
    return Mask(units or {"a": torch.tensor([0], dtype=torch.int32)}, LAYOUTS, "block")


@given(masks(), masks())
@settings(max_examples=60, deadline=None)
def test_set_operators_are_boolean_algebra(left: Mask, right: Mask) -> None:
    cases: list[tuple[Callable[[], Mask], Callable[..., torch.Tensor]]] = [
        (lambda: left | right, torch.logical_or),
        (lambda: left & right, torch.logical_and),
        (lambda: left - right, lambda a, b: a & ~b),
    ]
    for operation, dense in cases:
        expected = {name: dense(left.dense(name), right.dense(name)) for name in LAYOUTS}
        if not any(bool(part.any()) for part in expected.values()):
            with pytest.raises(ValueError, match="selects nothing"):
                operation()
            continue
        result = operation()
        for name in LAYOUTS:
            assert torch.equal(result.dense(name), expected[name])
        assert all(units.dtype == torch.int32 for units in result.units.values())
    both = sum(int((left.dense(n) & right.dense(n)).sum()) for n in LAYOUTS)
    either = sum(int((left.dense(n) | right.dense(n)).sum()) for n in LAYOUTS)
    assert overlap(left, right) == both / either


def test_masks_of_different_models_are_not_combined() -> None:
    mask = Mask({"a": torch.tensor([0, 1], dtype=torch.int32)}, LAYOUTS, "block", {"model": "one"})
    assert (mask | mask.with_meta(task="t")).meta == {"model": "one", "method": "union"}
    with pytest.raises(ValueError, match="made for the models one and two; combine masks of one model"):
        combine(mask, mask.with_meta(model="two"), "union")
    other = Mask({"a": torch.tensor([0], dtype=torch.int32)}, {"a": UnitLayout((6, 8), 2)}, "block")
    with pytest.raises(ValueError, match="differ in granularity or shapes; combine masks of one model"):
        combine(mask, other, "intersection")


def test_a_union_of_masks_of_several_kinds_is_of_elements() -> None:
    masks = []
    for seed, (granularity, unit, names) in enumerate(
        (("element", 1, "ab"), ("row", 8, "a"), ("block", 3, "abc"))
    ):
        layouts = {name: UnitLayout(SHAPES[name], unit) for name in names}
        masks.append(random_mask(layouts, granularity, 0.4, seed).with_meta(model="aaaa"))
    found = union(masks)
    assert (found.granularity, set(found.layouts)) == ("element", set(SHAPES))
    for name in SHAPES:
        chosen = [mask.dense(name) for mask in masks if name in mask.units]
        assert torch.equal(found.dense(name), torch.stack(chosen).any(0))
    assert union(masks[:1]) is masks[0]
    assert union([masks[1], masks[1]]) == masks[1]
    with pytest.raises(ValueError, match="made for the models aaaa and bbbb"):
        union([masks[0], masks[1].with_meta(model="bbbb")])
    wider = random_mask({"a": UnitLayout((6, 9), 1)}, "element", 0.4, 0)
    with pytest.raises(ValueError, match="differ in granularity or shapes"):
        union([masks[1], wider])
