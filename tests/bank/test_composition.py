"""One delta out of several."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bank.samples import DTYPES, base_model, make_delta, same_bits
from torch import Tensor

from trace_dist import Delta
from trace_dist.bank.composition import compose


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


def test_composition_of_strangers() -> None:
    model = base_model()
    one, other = make_delta(model, "a", 0), make_delta(model, "b", 1)
    with pytest.raises(ValueError, match="there are none to compose"):
        compose([], model, "all")
    foreign = replace(other, mask=other.mask.with_meta(model="bbbb"))
    with pytest.raises(ValueError, match="made for the models aaaa and bbbb"):
        compose([replace(one, mask=one.mask.with_meta(model="aaaa")), foreign], model, "all")
    with pytest.raises(ValueError, match="differ in granularity"):
        compose([one, make_delta(model, "b", 1, granularity="row", density=0.2)], model, "all")
