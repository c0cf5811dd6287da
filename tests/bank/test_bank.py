"""The bank: what goes in comes out, and what does not belong there is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bank.samples import base_model, make_delta, same_bits, signature

from trace_dist import DeltaBank
from trace_dist.bank.bank import BASE
from trace_dist.bank.delta import extract_delta
from trace_dist.models import fingerprint


def test_bank(tmp_path: Path) -> None:
    model = base_model()
    base, identity = model.full_state_dict(), fingerprint(model.module)
    bank = DeltaBank.create(tmp_path, identity, layer=1)
    bank.add(signature(BASE, 0), None)
    deltas = [make_delta(model, task, seed) for seed, task in ((1, "one"), (2, "two"))]
    for seed, delta in enumerate(deltas, start=1):
        bank.add(signature(delta.task, seed), delta)
    reopened = DeltaBank(tmp_path)
    assert reopened.tasks == [BASE, "one", "two"]
    assert reopened.base == identity
    assert reopened.retrieve(torch.full((1, 8), 20.0)) == ["two"]
    for delta in deltas:
        with reopened.activated(model, delta.task):
            assert same_bits(
                dict(extract_delta(model, delta.mask, "x").values), dict(delta.values), "float32"
            )
        assert same_bits(model.full_state_dict(), base, "float32")
    with reopened.activated(model, BASE):
        assert same_bits(model.full_state_dict(), base, "float32")


def test_bank_refusals(tmp_path: Path) -> None:
    model = base_model()
    bank = DeltaBank.create(tmp_path / "bank", "aaaa", layer=1)
    delta = make_delta(model, "one")
    foreign = replace(delta, mask=delta.mask.with_meta(model="bbbb"))
    with pytest.raises(ValueError, match="delta 'one': made for model bbbb, but the model given is aaaa"):
        bank.add(signature("one", 1), foreign)
    with pytest.raises(ValueError, match="comes with the signature of 'two'"):
        bank.add(signature("two", 1), delta)
    assert bank.tasks == []
    bank.add(signature("one", 1), delta)
    with pytest.raises(ValueError, match="one"):
        bank.add(signature("one", 2), delta)
    with pytest.raises(ValueError, match="task='two': not in the bank"):
        bank.delta("two")
    bank.path("one").unlink()
    with pytest.raises(ValueError, match="no such delta file"):
        bank.delta("one")
    with pytest.raises(ValueError, match=r"bank\.json: no such file"):
        DeltaBank(tmp_path / "nowhere")


def test_creating_a_bank_that_is_there_opens_it(tmp_path: Path) -> None:
    bank = DeltaBank.create(tmp_path, "aaaa", layer=1)
    bank.add(signature("one", 1), make_delta(base_model(), "one"))
    again = DeltaBank.create(tmp_path, "aaaa", layer=1)
    assert again.tasks == ["one"]
    assert again.delta("one") is not None
    with pytest.raises(ValueError, match="made for the base model aaaa, not for bbbb; choose another folder"):
        DeltaBank.create(tmp_path, "bbbb", layer=1)
    with pytest.raises(ValueError, match=r"bank\.layer=2: .* made with 1; set that"):
        DeltaBank.create(tmp_path, "aaaa", layer=2)
    assert DeltaBank(tmp_path).tasks == ["one"]
