"""Sketches estimate the cosines of whole updates, as well as they promise."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trace_dist.bank.sketch import NUM_BUCKETS, Sketch, cosines, sketch_update

SHAPES = {"a": (37, 91), "b": (1,), "c": (1024,), "d": (1025,), "e": (3, 5, 701), "f": (0,)}


def update(seed: int, like: dict[str, Tensor] | None = None, share: float = 0.0) -> dict[str, Tensor]:
    """A random update of odd shapes with heavy tails; ``share`` of it is another one's."""
    generator = torch.Generator().manual_seed(seed)
    own = {name: torch.randn(shape, generator=generator) ** 3 for name, shape in SHAPES.items()}
    return own if like is None else {name: own[name] + share * like[name] for name in own}


def exact_cosines(updates: list[dict[str, Tensor]], names: list[str]) -> Tensor:
    """Of the first update with the others, from the updates themselves: [T - 1] fp64; 0 where one is zero."""
    flat = torch.stack([torch.cat([u[name].flatten().double() for name in names]) for u in updates])
    gram = flat @ flat.T
    norms = gram.diagonal().sqrt()
    return (gram / torch.outer(norms, norms).clamp_min(1e-300))[0, 1:]


def test_cosines_are_near_the_exact_ones() -> None:
    first = update(0)
    updates = [
        first,
        update(1),
        update(2, first, 1.0),
        update(3, first, -3.0),
        {n: 2 * u for n, u in first.items()},
    ]
    exact = exact_cosines(updates, list(SHAPES))
    sketches = [sketch_update(u, seed=5) for u in updates]
    found = cosines(sketches[0], sketches[1:])
    spread = (1 - exact.square()) / NUM_BUCKETS**0.5
    assert ((found.total - exact).abs() <= 4 * spread + 1e-6).all()
    for name, shape in SHAPES.items():
        one = exact_cosines(updates, [name])
        if prod(shape) == 0:
            one = torch.zeros(4, dtype=torch.float64)
        allowed = 0.0 if prod(shape) <= NUM_BUCKETS else 4 / NUM_BUCKETS**0.5
        assert ((found.tensors[name] - one).abs() <= allowed * (1 - one.square()) + 1e-6).all(), name
    assert found.total[3] == pytest.approx(1, abs=1e-6)


def test_inner_products_are_unbiased_with_the_stated_variance() -> None:
    """Over many hash functions: the mean is exact, the variance at most the bound, and not far below it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, generator=generator)
    y = torch.randn(2000, generator=generator) + 0.5 * x
    inner, buckets, trials = float(x @ y), 64, 2000
    products = []
    for seed in range(trials):
        one, other = (sketch_update({"w": v}, seed, num_buckets=buckets).values["w"] for v in (x, y))
        products.append(float(one.double() @ other.double()))
    estimates = torch.tensor(products, dtype=torch.float64)
    bound = float(x.square().sum() * y.square().sum() + inner**2) / buckets
    assert abs(float(estimates.mean()) - inner) <= 4 * (bound / trials) ** 0.5
    assert 0.8 * bound <= float(estimates.var()) <= 1.15 * bound


def test_every_element_counts_once_in_one_bucket_and_buckets_fill_evenly() -> None:
    size, buckets = 5000, 100
    counts = torch.zeros(buckets)
    signs = 0.0
    for index in range(0, size, 10):
        single = torch.zeros(size)
        single[index] = 1
        found = sketch_update({"w": single}, 0, num_buckets=buckets).values["w"]
        assert int(found.ne(0).sum()) == 1
        assert float(found.abs().sum()) == 1
        counts += found.abs()
        signs += float(found.sum())
    assert float((counts - 5).square().sum() / 5) < 150
    assert abs(signs) < 4 * 500**0.5


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sketch_update({"w": torch.arange(5000.0)}, 0)
    monkeypatch.setattr("trace_dist.bank.sketch.CHUNK", 7)
    assert torch.equal(sketch_update({"w": torch.arange(5000.0)}, 0).values["w"], whole.values["w"])


def test_tensors_and_seeds_have_hash_functions_of_their_own() -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    one, other = sketch_update({"v": x, "w": x}, 0), sketch_update({"w": x}, 1)
    assert not torch.equal(one.values["v"], one.values["w"])
    assert not torch.equal(other.values["w"], one.values["w"])


def test_half_precision_and_no_earlier_task() -> None:
    half = {name: value.bfloat16() for name, value in update(0).items()}
    sketch = sketch_update(half, 0)
    full = sketch_update({name: value.float() for name, value in half.items()}, 0)
    assert cosines(sketch, [full]).total[0] == pytest.approx(1)
    assert cosines(sketch, []).total.shape == (0,)
    assert cosines(sketch, []).tensors["a"].shape == (0,)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "sketch.safetensors"
    sketch = sketch_update(update(0), 7, "proxy")
    sketch.save(path)
    loaded = Sketch.load(path)
    assert (loaded.seed, loaded.model, loaded.num_buckets) == (7, "proxy", NUM_BUCKETS)
    assert dict(loaded.numels) == {name: prod(shape) for name, shape in SHAPES.items()}
    for name in SHAPES:
        assert torch.equal(loaded.values[name], sketch.values[name])
    assert path.stat().st_size < 4 * NUM_BUCKETS * 4 + 4096


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            sketch_update({"w": torch.ones(3)}, 0, "b"),
            "of the proxy a, the earlier one of b; probe with the proxy",
        ),
        (sketch_update({"w": torch.ones(3)}, 1, "a"), "seed 0 and 1024 buckets, the earlier one 1 and 1024"),
        (sketch_update({"w": torch.ones(3)}, 0, "a", 8), "the earlier one 0 and 8"),
        (sketch_update({"v": torch.ones(3)}, 0, "a"), "of other parameters"),
        (sketch_update({"w": torch.ones(4)}, 0, "a"), "of other parameters"),
    ],
)
def test_what_cannot_be_compared(other: Sketch, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cosines(sketch_update({"w": torch.ones(3)}, 0, "a"), [other])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_diverged_probe(value: float) -> None:
    with pytest.raises(ValueError, match="update of 'w': NaN or infinite; the probe diverged"):
        sketch_update({"w": torch.tensor([1.0, value])}, 0)
