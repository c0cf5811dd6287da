"""Scores measured on the target in its shards equal those of a plain model, and the model is put back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from probe.setting import NARROW, make_batches, make_config, make_model, reference_gradients
from projection.rank_script import GRANULARITIES

from trace_dist.config import MaskConfig, ProjectionConfig
from trace_dist.masks import Mask, UnitLayout
from trace_dist.masks.ops import Scores, layouts_for, overlap, place, random_mask
from trace_dist.projection.placements import narrow as narrow_placement_file
from trace_dist.projection.placements.narrow import OUTSIDE, narrow_scores
from trace_dist.projection.placements.narrow import Options as NarrowOptions
from trace_dist.projection.placements.narrow import scores as narrow_placement
from trace_dist.projection.placements.refine import fisher_scores
from trace_dist.projection.project import project_task
from trace_dist.projection.site import Site
from trace_dist.sharding.base import ShardedModel
from trace_dist.sharding.build import shard

SHARDED = [pytest.param(backend, marks=pytest.mark.launcher) for backend in ("zero3", "fsdp2")]


@pytest.fixture(params=["single", *SHARDED])
def found(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=SHARDED)
def sharded(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def unit_means(values: torch.Tensor, layout: UnitLayout) -> torch.Tensor:
    """Mean over each unit, one unit after the other."""
    flat = values.flatten()
    return torch.stack([flat[layout.elements(torch.tensor([u]))].mean() for u in range(layout.num_units)])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_fisher_equals_the_dense_reference(granularity: str, found: Any) -> None:
    model = make_model()
    gradients = reference_gradients(model, make_batches(), 2)
    scores = found.part(f"fisher/{granularity}")
    layouts = layouts_for(model, granularity, 16, "all")
    assert set(scores) == set(layouts)
    for name in list(layouts) if granularity != "element" else ["model.layers.1.mlp.down_proj.weight"]:
        mean = (gradients[0][name].square() + gradients[1][name].square()) / 2
        expected = unit_means(mean, layouts[name]).sqrt()
        torch.testing.assert_close(
            scores[name].double(), expected, rtol=1e-3, atol=1e-4 * float(expected.max())
        )


def test_every_rank_has_the_same_scores_and_masks(sharded: Any) -> None:
    first, second = sharded.tensors
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_largest_magnitudes_equal_dense_top_k(granularity: str, found: Any) -> None:
    """Shards cut units; their parts are put together before units are ranked."""
    model = make_model()
    layouts = layouts_for(model, granularity, 16, "all")
    dense = {name: p.detach().double().abs() for name, p in model.named_parameters()}
    budgets = {name: 0.2 * layout.numel for name, layout in layouts.items()}
    expected = place(
        layouts, granularity, budgets, lambda name, layout: unit_means(dense[name], layout).float()
    )
    units = found.part(f"magnitude/{granularity}")
    assert units.keys() == expected.units.keys()
    assert all(torch.equal(chosen, expected.units[name]) for name, chosen in units.items())


def test_the_model_is_put_back_bit_for_bit(found: Any) -> None:
    assert all(fact["restored"] for fact in found.facts)


@pytest.mark.launcher
def test_zero3_cuts_units(zero3: Any) -> None:
    """So that the comparisons below cover units whose parts lie on two ranks."""
    assert zero3.facts[0]["cut"] > 0


def test_narrowing_in_shards_equals_narrowing_in_one_process(single: Any, sharded: Any) -> None:
    expected, scores = single.part("narrow"), sharded.part("narrow")
    for name, values in expected.items():
        inside = values != OUTSIDE
        assert torch.equal(scores[name] == OUTSIDE, ~inside)
        torch.testing.assert_close(
            scores[name][inside], values[inside], rtol=5e-3, atol=2e-3 * float(values.max())
        )


def test_the_target_alone_makes_the_same_mask_in_shards(single: Any, sharded: Any) -> None:
    """But for a few units at the limit, since sums are rounded in another order."""
    pairs = [
        {(name, unit) for name, units in each.part("target").items() for unit in units.tolist()}
        for each in (single, sharded)
    ]
    assert len(pairs[0] & pairs[1]) >= 0.97 * len(pairs[0])
    layouts = layouts_for(make_model(), "block", 16, "linear")
    for name, layout in layouts.items():
        units = sharded.part("target")[name]
        assert 0.02 * layout.numel - 8 <= int(layout.sizes(units).sum()) <= 0.3 * layout.numel + 8


def narrow(model: ShardedModel, pool: Mask) -> Scores:
    cfg = make_config()
    return narrow_scores(model, pool, make_batches(), NARROW, cfg.probe, cfg.train)


def planted() -> tuple[Any, str, torch.Tensor]:
    """A model in which only ten rows of one matrix can matter: what the others feed is multiplied by zero."""
    model = make_model()
    active = torch.arange(0, 50, 5)
    down = model.model.layers[0].mlp.down_proj.weight.data
    columns = down[:, active].clone()
    down.zero_()
    down[:, active] = columns
    return shard(model), "model.layers.0.mlp.up_proj.weight", active


@pytest.mark.parametrize("granularity", ["element", "row"])
def test_narrowing_finds_the_entries_that_matter(granularity: str) -> None:
    model, name, active = planted()
    layout = UnitLayout((50, 36), 36 if granularity == "row" else 1)
    rows = torch.arange(0, 25)  # the pool holds five of the ten
    units = rows if granularity == "row" else layout.elements(torch.arange(25 * 36))
    before = model.full_state_dict()
    pool = Mask({name: units.int()}, {name: layout}, granularity)
    scores = narrow(model, pool)
    chosen = place({name: layout}, granularity, {name: 5 * 36.0}, scores)
    expected = torch.zeros(50, 36, dtype=torch.bool)
    expected[active[active < 25]] = True
    assert torch.equal(chosen.dense(name), expected)
    assert float(scores(name, layout)[-1]) == OUTSIDE
    assert all(torch.equal(value, before[key]) for key, value in model.full_state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


def site_of(model: ShardedModel, layouts: dict[str, UnitLayout], density: float, **changes: Any) -> Site:
    cfg = make_config()
    budgets = {name: density * layout.numel for name, layout in layouts.items()}
    values = {"granularity": "element", "budgets": budgets, "task": "t", "batches": make_batches}
    values |= {"probe": cfg.probe, "train": cfg.train, "seed": 0, "refused": {}}
    return Site(model=model, layouts=layouts, **{**values, **changes})


def chosen(scores: Scores, name: str, layout: UnitLayout) -> torch.Tensor:
    """Units that were in the pool."""
    return (scores(name, layout) != OUTSIDE).nonzero().flatten()


@pytest.mark.parametrize("refused", [False, True])
def test_pools_hold_magnitudes_gradients_or_half_of_each(refused: bool) -> None:
    model, name, _ = planted()
    layout = UnitLayout((50, 36), 1)
    layouts, held = {name: layout}, {name: torch.arange(0, 1800, 7, dtype=torch.int32)} if refused else {}
    site, size = site_of(model, layouts, 0.1, refused=held), 360
    magnitude = model.values(name).float().abs().flatten()
    fisher = fisher_scores(model, layouts, make_batches(), site.probe.fisher_batches)(name, layout)
    for each in (magnitude, fisher):
        each[held.get(name, torch.empty(0)).long()] = -1
    best = magnitude.argsort(descending=True, stable=True), fisher.argsort(descending=True, stable=True)
    half = best[0][: size // 2]
    rest = best[1][~torch.isin(best[1], half)][: size // 2]
    expected = {"magnitude": best[0][:size], "fisher": best[1][:size], "both": torch.cat([half, rest])}
    for pool, units in expected.items():
        options = NarrowOptions(pool=pool, pool_density=0.2, steps=1)
        found = narrow_placement(site_of(model, layouts, 0.05, refused=held), options)
        assert torch.equal(chosen(found, name, layout), units.sort().values), pool


def test_a_score_of_several_parts_is_scaled_over_the_pool() -> None:
    """As by the parts alone, put together by hand."""
    cfg = make_config()
    found = {}
    for score in ("l2", "fisher", "l2_plus_fisher"):
        model = shard(make_model())
        layouts = layouts_for(model, "block", 16, "linear")
        pool = random_mask(layouts, "block", 0.3, seed=0)
        scores = narrow_scores(
            model, pool, make_batches(), NARROW, replace(cfg.probe, score=score), cfg.train
        )
        found[score] = torch.cat([scores(name, layout) for name, layout in layouts.items()])
    inside = found["l2"] != OUTSIDE
    parts = [found["l2"][inside].double(), found["fisher"][inside].double().square()]
    expected = sum((part - part.min()) / (part.max() - part.min()) / 2 for part in parts)
    torch.testing.assert_close(found["l2_plus_fisher"][inside].double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(found["l2_plus_fisher"] != OUTSIDE, inside)


@pytest.mark.parametrize("share_of", ["elements", "tensors"])
def test_without_a_proxy_all_tensors_of_the_target_compete(share_of: str) -> None:
    """The whole selection against gradients of a plain model; what is refused goes to the next best, wherever they lie."""
    granularity = "element" if share_of == "elements" else "tensor"
    cfg, model = make_config(), shard(make_model())
    mask = MaskConfig(density=0.1, granularity=granularity, share_of=share_of)
    layouts = layouts_for(model, granularity, 1, "linear")
    gradients = reference_gradients(make_model(), make_batches(), cfg.probe.fisher_batches)
    means = {name: sum(g[name].square() for g in gradients) / len(gradients) for name in layouts}
    flat = torch.cat([unit_means(means[name], layouts[name]) if share_of == "tensors" else means[name].flatten()
                      for name in layouts])  # fmt: skip
    best = flat.argsort(descending=True)
    ends = torch.tensor([layout.num_units for layout in layouts.values()]).cumsum(0).tolist()
    starts = dict(zip(layouts, [0, *ends[:-1]], strict=True))
    refused = {}
    for name, layout in layouts.items():
        held = best[:3] - starts[name]
        held = held[(held >= 0) & (held < layout.num_units)]
        if len(held):
            refused[name] = held.sort().values
    made = project_task(
        model, None, "t", make_batches, mask=mask, projection=ProjectionConfig("target"), probe=cfg.probe,
        train=cfg.train, seed=0, refused=refused,
    )  # fmt: skip
    assert made.meta["method"] == "projected/target"
    size = round(0.1 * len(flat))
    expected = set(best[3 : 3 + size].tolist())
    units = {starts[name] + unit for name, chosen in made.units.items() for unit in chosen.tolist()}
    assert len(units) == size
    # Gradients in fp32 and fp64 may order a few at the limit differently.
    assert len(units - expected) <= 0.01 * size


def test_the_target_alone_is_narrowed_from_its_largest_gradients() -> None:
    cfg, model = make_config(), shard(make_model())
    before = model.full_state_dict()

    def made(placement: str, density: float, **options: Any) -> Mask:
        return project_task(
            model, None, "t", make_batches, mask=MaskConfig(density=density),
            projection=ProjectionConfig(placement, options), probe=cfg.probe, train=cfg.train, seed=0,
        )  # fmt: skip

    pool, steepest = made("target", 0.2), made("target", 0.05)
    narrowed = made("narrow_target", 0.05, pool_density=0.2, steps=2)
    assert narrowed.num_entries == steepest.num_entries
    assert overlap(narrowed, pool) == pytest.approx(narrowed.num_entries / pool.num_entries)
    assert narrowed != steepest
    assert all(torch.equal(value, before[name]) for name, value in model.full_state_dict().items())
    with pytest.raises(ValueError, match="pool"):
        made("narrow_target", 0.05, pool="magnitude")
    with pytest.raises(ValueError, match=r"pool_density=0\.1: must be at least mask\.density=0\.3"):
        made("narrow_target", 0.3)


@pytest.mark.parametrize(
    "changes",
    [{"scope": "tensor"}, {"floor": 0.04}, {"cap": 0.06}, {"granularity": "row", "scope": "tensor"}],
    ids=str,
)
def test_what_is_narrowed_from_the_target_alone_was_in_the_pool(
    changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where each tensor is to have its share: those of few large gradients would get their first units."""
    cfg, model, pools = make_config(), shard(make_model()), []

    def watched(model: ShardedModel, pool: Mask, *rest: Any) -> Scores:
        pools.append(pool)
        return narrow_scores(model, pool, *rest)

    monkeypatch.setattr(narrow_placement_file, "narrow_scores", watched)
    made = project_task(
        model, None, "t", make_batches, mask=MaskConfig(density=0.05, **changes),
        projection=ProjectionConfig("narrow_target", {"pool_density": 0.1, "steps": 1}), probe=cfg.probe,
        train=cfg.train, seed=0,
    )  # fmt: skip
    (pool,) = pools
    for name, units in made.units.items():
        assert bool(torch.isin(units, pool.units[name]).all()), name


def test_the_least_weight_that_counts_is_that_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank holds two weights of 3, beside this one's 1 and 2, and none of a second parameter."""

    def both(value: torch.Tensor) -> torch.Tensor:
        return value + torch.tensor([[18.0, 2.0], [0.0, 0.0]])

    monkeypatch.setattr(narrow_placement_file.dist, "sum_over_ranks", both)
    found = narrow_placement_file._mean_squares([torch.tensor([1.0, 2.0]), torch.zeros(0)])
    assert found == [23 / 4, 0.0]


def test_narrowing_hands_on_the_mean_square_of_each_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = shard(make_model()), []
    pool = Mask.random(model, 0.3, "row")
    of = narrow_placement_file.element_energy

    def watched(evidence: Any, score: str) -> torch.Tensor:
        seen.append((evidence.mean_square, float(evidence.weight.double().square().mean())))
        return of(evidence, score)

    monkeypatch.setattr(narrow_placement_file, "element_energy", watched)
    narrow(model, pool)
    assert len(seen) == len(pool.units)
    assert all(mean == pytest.approx(expected) for mean, expected in seen)


def test_narrowing_restores_bf16_weights_bit_for_bit() -> None:
    model = shard(make_model().bfloat16())
    before = model.full_state_dict()
    pool = Mask.random(model, 0.3, "block", block=16, maskable="all")
    narrow(model, pool)
    assert all(
        torch.equal(value.view(torch.int16), before[name].view(torch.int16))
        for name, value in model.full_state_dict().items()
    )


def test_fisher_finds_the_entries_that_matter() -> None:
    model, name, active = planted()
    layouts = {name: UnitLayout((50, 36), 36)}
    scores = fisher_scores(model, layouts, make_batches(), 1)(name, layouts[name])
    assert scores.nonzero().flatten().tolist() == active.tolist()


def test_units_are_never_listed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of a large embedding's entries takes tens of bytes for each."""
    model, tensor = shard(make_model()), torch.tensor
    layouts = layouts_for(model, "element", 1, "linear")
    scores = fisher_scores(model, layouts, make_batches(), 1)

    def small(data: Any, **options: Any) -> torch.Tensor:
        assert not isinstance(data, range)
        return tensor(data, **options)

    monkeypatch.setattr(torch, "tensor", small)
    for name, layout in layouts.items():
        scores(name, layout)


def test_fisher_does_not_grow_with_the_number_of_micro_batches() -> None:
    """Micro-batches are samples of their own: noisier than whole batches, but of the same scale."""
    means = {}
    for size in (8, 2):
        model = shard(make_model())
        layouts = layouts_for(model, "tensor", 16, "linear")
        scores = fisher_scores(model, layouts, make_batches(micro_batch_size=size), 2)
        means[size] = torch.cat([scores(name, layout) for name, layout in layouts.items()])
    assert bool((means[2] > means[8]).all())
    # Gradients of two examples, against eight: at most 2 by noise alone.
    assert float((means[2] / means[8]).max()) < 3
