"""One delta out of several."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bank.samples import DTYPES, base_model, make_delta, same_bits
from torch import Tensor

from trace_dist import Delta, Mask
from trace_dist.bank.composition import compose
from trace_dist.bank.delta import applied


def dense_change(delta: Delta, base: dict[str, Tensor]) -> dict[str, Tensor]:
    change = {name: torch.zeros(value.numel(), dtype=torch.float64) for name, value in base.items()}
    for name in delta.mask:
        entries = delta.mask.elements(name)
        change[name][entries] = delta.values[name].double() - base[name].flatten()[entries].double()
    return change


@pytest.mark.parametrize("dtype", DTYPES)
def test_composition_adds_changes_and_is_exact_where_masks_do_not_overlap(dtype: str) -> None:
    model = base_model(dtype)
    base = model.full_state_dict()
    # Three, two of the same task name: composing must not confuse them.
    deltas = [make_delta(model, task, seed, density=0.3) for task, seed in (("a", 0), ("b", 1), ("a", 2))]
    both = compose(deltas, model, "all")
    assert same_bits(model.full_state_dict(), base, dtype)
    changes = [dense_change(delta, base) for delta in deltas]
    for name in both.mask:
        entries = both.mask.elements(name)
        own = base[name].flatten()[entries]
        times = sum((delta.mask.dense(name).flatten()[entries].int() for delta in deltas), torch.zeros(()))
        expected = own.double() + sum(change[name][entries] for change in changes)
        tolerance = 1e-6 if dtype == "float32" else 1e-2
        torch.testing.assert_close(both.values[name].double(), expected, rtol=tolerance, atol=tolerance)
        for delta in deltas:
            mine = torch.isin(entries, delta.mask.elements(name)) & (times == 1)
            theirs = torch.isin(delta.mask.elements(name), entries[mine])
            assert torch.equal(both.values[name][mine], delta.values[name][theirs])
        assert int((times > 1).sum()) > 0 or len(entries) < 50


def test_deltas_of_another_dtype_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"delta 'a': holds torch.bfloat16, the model torch.float32; load the model"
    ):
        compose(three("bfloat16"), base_model(), "all")


def test_composition_of_strangers() -> None:
    model = base_model()
    one, other = make_delta(model, "a", 0), make_delta(model, "b", 1)
    with pytest.raises(ValueError, match="there are none to compose"):
        compose([], model, "all")
    foreign = replace(other, mask=other.mask.with_meta(model="bbbb"))
    with pytest.raises(ValueError, match="made for the models aaaa and bbbb"):
        compose([replace(one, mask=one.mask.with_meta(model="aaaa")), foreign], model, "all")
    wider = base_model(family="qwen2")
    with pytest.raises(ValueError, match="differ in granularity or shapes"):
        compose([one, make_delta(wider, "b", 1, granularity="row", density=0.2)], model, "all")


@pytest.mark.parametrize("kind", ["sum", "average", "ties", "dare", "magnitude_max"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_of_several_kinds_go_together(kind: str, dtype: str) -> None:
    """As tasks of two people, or of one bank over the years: their entries count, not how they were selected."""
    model = base_model(dtype)
    deltas = [
        make_delta(model, "a", 0, density=0.3),
        make_delta(model, "b", 1, granularity="row", density=0.3),
        make_delta(model, "c", 2, granularity="column", density=0.3, maskable="linear"),
        make_delta(model, "d", 3, granularity="block", block=7, density=0.3),
    ]
    found = compose(deltas, model, "all", kind)
    assert found.mask.granularity == "element"
    alike = compose(list(map(in_elements, deltas)), model, "all", kind)
    assert found.mask == alike.mask
    assert same_bits(dict(found.values), dict(alike.values), dtype)
    with applied(model, found):
        pass
    for name in found.mask:
        chosen = torch.stack([delta.mask.dense(name) for delta in deltas if name in delta.mask.units])
        assert torch.equal(found.mask.dense(name), chosen.any(0))


def in_elements(delta: Delta) -> Delta:
    """The same delta, as one of an element mask over all parameters."""
    layouts = make_delta(base_model(), "x").mask.layouts
    units = {name: delta.mask.elements(name).int() for name in delta.mask}
    return replace(delta, mask=Mask(units, layouts, "element", delta.mask.meta))


def three(dtype: str = "float32") -> list[Delta]:
    base = base_model(dtype)
    return [make_delta(base, task, seed, density=0.3) for task, seed in (("a", 0), ("b", 1), ("c", 2))]


def test_the_average_of_the_models() -> None:
    """A model that does not hold an entry has the base's value there."""
    model, deltas = base_model(), three()
    base = model.full_state_dict()
    found = dense_change(compose(deltas, model, "all", "average"), base)
    for name, change in found.items():
        models = [base[name].flatten().double() + dense_change(delta, base)[name] for delta in deltas]
        expected = torch.stack(models).mean(0) - base[name].flatten().double()
        torch.testing.assert_close(change, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("keep", "weight"), [(1.0, 1.0), (0.2, 1.0), (0.5, 0.3)])
def test_ties_is_the_papers_algorithm(keep: float, weight: float) -> None:
    """Beside algorithm 1 on dense vectors of all parameters, one after another."""
    model, deltas = base_model(), three()
    base = model.full_state_dict()
    names = list(base)
    vectors = []
    for delta in deltas:
        change = torch.cat([dense_change(delta, base)[name] for name in names])
        count = max(1, round(keep * delta.mask.num_entries))
        least = change.abs().topk(count).values[-1]
        vectors.append(torch.where(change.abs() >= least, change, 0.0))
    positive = sum(vector.clamp(min=0) for vector in vectors)
    negative = sum((-vector).clamp(min=0) for vector in vectors)
    wanted = []
    for values in zip(*(vector.tolist() for vector in vectors), (positive - negative).tolist(), strict=True):
        *each, elected = values
        agreeing = [value for value in each if value * elected > 0]
        wanted.append(weight * sum(agreeing) / len(agreeing) if agreeing else 0.0)
    options = {"keep": keep, "weight": weight}
    found = dense_change(compose(deltas, model, "all", "ties", options), base)
    got = torch.cat([found[name] for name in names])
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-7)
    assert 0 < int((got != 0).sum()) <= len(got)


def test_the_largest_change_of_each_entry() -> None:
    model, deltas = base_model(), three()
    base = model.full_state_dict()
    changes = [dense_change(delta, base) for delta in deltas]
    for name, found in dense_change(compose(deltas, model, "all", "magnitude_max"), base).items():
        each = torch.stack([change[name] for change in changes])
        expected = torch.where(each.amax(0) >= -each.amin(0), each.amax(0), each.amin(0))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_dare_drops_and_rescales() -> None:
    model, deltas = base_model(), three()[:1]
    base = model.full_state_dict()
    change, kept, total = dense_change(deltas[0], base), 0, 0
    options = {"drop": 0.75, "weight": 0.5}
    found = dense_change(compose(deltas, model, "all", "dare", options), base)
    for name, value in found.items():
        left = value != 0
        torch.testing.assert_close(value[left], 0.5 / 0.25 * change[name][left], rtol=1e-4, atol=1e-6)
        kept, total = kept + int(left.sum()), total + int((change[name] != 0).sum())
    # four standard deviations of a binomial count
    assert kept / total == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / total) ** 0.5)


def test_dare_depends_on_its_seed_alone() -> None:
    model, deltas = base_model(), three()
    one, again, other = (compose(deltas, model, "all", "dare", {"seed": seed}).values for seed in (3, 3, 4))
    assert all(torch.equal(again[name], value) for name, value in one.items())
    assert any(not torch.equal(other[name], value) for name, value in one.items())
    nothing_dropped = compose(deltas, model, "all", "dare", {"drop": 0.0})
    total = compose(deltas, model, "all", "sum")
    assert all(torch.equal(nothing_dropped.values[name], value) for name, value in total.values.items())


@pytest.mark.parametrize("kind", ["sum", "ties", "dare", "magnitude_max"])
def test_a_delta_alone_stays_what_it_is(kind: str) -> None:
    model = base_model("bfloat16")
    (delta, *_) = three("bfloat16")
    found = compose([delta], model, "all", kind, {"drop": 0.0} if kind == "dare" else None)
    assert all(torch.equal(found.values[name], value) for name, value in delta.values.items())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("ties", {"keep": 0.0}, r"composition.options.keep=0.0: must lie in \(0, 1\]"),
        ("dare", {"drop": 1.0}, r"composition.options.drop=1.0: must lie in \[0, 1\)"),
        ("sum", {"weight": 1.0}, "it has no options"),
        ("linear", None, "choose among sum, average, ties, dare, magnitude_max"),
    ],
)
def test_options_of_a_composition(kind: str, options: dict[str, float] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose(three(), base_model(), "all", kind, options)
