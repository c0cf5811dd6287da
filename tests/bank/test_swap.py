"""A task's values, put into a model again and again."""

from __future__ import annotations

import pytest
import torch
from bank.samples import DTYPES, base_model, bits, make_delta, same_bits

from trace_dist.bank.delta import extract_delta, made_ready


@pytest.mark.parametrize("granularity", ["element", "row"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_goes_in_and_out_as_often_as_one_likes(dtype: str, granularity: str) -> None:
    model = base_model(dtype)
    before = model.full_state_dict()
    one, other = (made_ready(model, make_delta(model, seed=seed, granularity=granularity)) for seed in (0, 1))
    wanted = [make_delta(model, seed=seed, granularity=granularity) for seed in (0, 1)]
    for swap, delta in ((one, wanted[0]), (other, wanted[1]), (one, wanted[0]), (one, wanted[0])):
        with swap.applied():
            found = extract_delta(model, delta.mask, "again")
            assert same_bits(dict(found.values), dict(delta.values), dtype)
        assert same_bits(model.full_state_dict(), before, dtype)


@pytest.mark.parametrize("granularity", ["element", "row"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_with_the_models_own_values_it_goes_in_and_out_alike(dtype: str, granularity: str) -> None:
    model = base_model(dtype)
    before = model.full_state_dict()
    wanted = [make_delta(model, seed=seed, granularity=granularity) for seed in (0, 1)]
    swaps = [made_ready(model, delta) for delta in wanted]
    for swap, delta in zip(swaps, wanted, strict=True):
        size = swap.nbytes
        swap.keep_own()
        assert swap.keeps_own
        assert swap.nbytes == size + sum(values.nbytes for values in delta.values.values())
    for number in (0, 1, 0, 0):
        with swaps[number].applied():
            found = extract_delta(model, wanted[number].mask, "again")
            assert same_bits(dict(found.values), dict(wanted[number].values), dtype)
        assert same_bits(model.full_state_dict(), before, dtype)
    with swaps[0].applied():
        swaps[0].forget_own()
    assert not swaps[0].keeps_own
    with swaps[0].applied():
        assert not same_bits(model.full_state_dict(), before, dtype)
    assert same_bits(model.full_state_dict(), before, dtype)


def test_the_delta_itself_stays_as_it_is() -> None:
    model = base_model()
    delta = make_delta(model)
    before = {name: values.clone() for name, values in delta.values.items()}
    with made_ready(model, delta).applied():
        assert same_bits(dict(delta.values), before, "float32")


def test_one_task_within_another() -> None:
    model = base_model()
    before = model.full_state_dict()
    outer, inner = (made_ready(model, make_delta(model, seed=seed)) for seed in (0, 1))
    with outer.applied():
        within = model.full_state_dict()
        with inner.applied():
            assert not same_bits(model.full_state_dict(), within, "float32")
        assert same_bits(model.full_state_dict(), within, "float32")
        with pytest.raises(AssertionError, match="the model holds its values already"):
            with outer.applied():
                pass
    assert same_bits(model.full_state_dict(), before, "float32")


def test_weights_that_have_moved_are_found_again() -> None:
    """Where they lay is remembered, and must not be written to any more."""
    model = base_model()
    before, delta = model.full_state_dict(), make_delta(model)
    swap = made_ready(model, delta)
    with swap.applied():
        pass
    left = [parameter.data for parameter in model.module.parameters()]
    for parameter in model.module.parameters():
        parameter.data = parameter.data.clone()
    kept = [tensor.clone() for tensor in left]
    with swap.applied():
        found = extract_delta(model, delta.mask, "again")
        assert same_bits(dict(found.values), dict(delta.values), "float32")
        for parameter in model.module.parameters():
            parameter.data = parameter.data.clone()
    assert same_bits(model.full_state_dict(), before, "float32")
    assert all(torch.equal(one, two) for one, two in zip(left, kept, strict=True))


def test_own_values_are_written_to_where_the_weights_are() -> None:
    model = base_model()
    before, delta = model.full_state_dict(), make_delta(model)
    swap = made_ready(model, delta)
    with swap.applied():
        pass
    swap.keep_own()
    with swap.applied():
        for parameter in model.module.parameters():
            parameter.data = parameter.data.clone()
    assert same_bits(model.full_state_dict(), before, "float32")
    for parameter in model.module.parameters():
        parameter.data = parameter.data.clone()
    for _ in range(2):
        with swap.applied():
            found = extract_delta(model, delta.mask, "again")
            assert same_bits(dict(found.values), dict(delta.values), "float32")
        assert same_bits(model.full_state_dict(), before, "float32")
        swap.forget_own()


def test_it_knows_its_size() -> None:
    """Values, and four bytes for each masked unit: an entry, or a row."""
    model = base_model("bfloat16")
    for granularity in ("element", "row"):
        delta = make_delta(model, granularity=granularity)
        entries = sum(map(len, bits(dict(delta.values), "bfloat16").values()))
        units = sum(map(len, delta.mask.units.values()))
        assert made_ready(model, delta).nbytes == 2 * entries + 4 * units
