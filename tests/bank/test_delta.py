"""Deltas: exact values, small files, refusals; composition; the bank's folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.cases import CASES, batches
from safetensors.torch import load_file, save_file
from torch import Tensor

from trace_dist import Delta, DeltaBank, Mask, shard
from trace_dist.bank.bank import BASE, compose
from trace_dist.bank.delta import Snapshot, applied, extract_delta
from trace_dist.bank.signature import Signature, fit_signature
from trace_dist.masks import UnitLayout
from trace_dist.models import fingerprint
from trace_dist.sharding import ShardedModel

DTYPES = {"float32": (torch.float32, torch.int32), "bfloat16": (torch.bfloat16, torch.int16)}
IDS = batches(CASES["element"])[0][0]


def base_model(dtype: str = "float32", family: str = "llama") -> ShardedModel:
    return shard(replace(CASES["element"], dtype=dtype, family=family).model(), "single")


def make_delta(model: ShardedModel, task: str = "tuned", seed: int = 0, **options: Any) -> Delta:
    """Random tuned values at a random mask; special values among them."""
    options = {"density": 0.05, "granularity": "element", "maskable": "all"} | options
    mask = Mask.random(model, seed=seed, **options).with_meta(task=task)
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name in mask:
        tuned = torch.randn(len(mask.elements(name)), generator=generator)
        tuned[0], tuned[-1] = -0.0, 1e-30
        values[name] = tuned.to(model.local(name).dtype)
    return Delta(mask, values, task)


def bits(state: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    return {name: value.view(DTYPES[dtype][1]) for name, value in state.items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor], dtype: str) -> bool:
    mine, theirs = bits(one, dtype), bits(other, dtype)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", ["element", "block", "row"])
def test_apply_extract_save_load_restore(dtype: str, granularity: str, tmp_path: Path) -> None:
    model = base_model(dtype)
    before = model.full_state_dict()
    delta = make_delta(model, granularity=granularity, density=0.2)
    delta.save(tmp_path / "tuned.safetensors")
    loaded = Delta.load(tmp_path / "tuned.safetensors")
    assert loaded.task == "tuned"
    assert loaded.mask == delta.mask
    assert same_bits(dict(loaded.values), dict(delta.values), dtype)
    with applied(model, loaded):
        inside = model.full_state_dict()
        found = extract_delta(model, delta.mask, "again")
        assert same_bits(dict(found.values), dict(delta.values), dtype)
    assert same_bits(model.full_state_dict(), before, dtype)
    for name in model.names():
        shape = model.shape(name)
        chosen = delta.mask.dense(name) if name in delta.mask else torch.zeros(shape, dtype=torch.bool)
        assert torch.equal(bits(inside, dtype)[name][~chosen], bits(before, dtype)[name][~chosen])
        if name in delta.mask:
            assert torch.equal(inside[name][chosen], delta.values[name])


def test_the_base_comes_back_after_an_error() -> None:
    model = base_model()
    before = model.full_state_dict()

    def fail() -> None:
        with applied(model, make_delta(model)):
            assert not same_bits(model.full_state_dict(), before, "float32")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert same_bits(model.full_state_dict(), before, "float32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_snapshot_puts_every_bit_back(dtype: str) -> None:
    model = base_model(dtype)
    before = model.full_state_dict()
    mask = make_delta(model).mask
    snapshot = Snapshot(model, mask)
    for name in mask:
        model.local(name)[mask.elements(name)] *= 3
    assert not same_bits(model.full_state_dict(), before, dtype)
    snapshot.restore()
    assert same_bits(model.full_state_dict(), before, dtype)


@pytest.mark.launcher
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_ranks(world, dtype: str) -> None:
    """Extracted and saved by 2 ZeRO-3 ranks, applied there and in one process: the tuned model bit for bit."""
    for report in world(2).reports:
        found = report["deltas"][dtype]
        assert found["restored"]
        assert found["inside"]
        assert found["after"]
        assert found["logits"]
    assert world(2).section("deltas")[dtype]["changed"]
    delta = Delta.load(world(2).folder / f"delta-{dtype}.safetensors")
    model = base_model(dtype)
    with applied(model, delta):
        assert same_bits(model.full_state_dict(), world(2).state(f"tuned-{dtype}"), dtype)


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 3.2), ("float32", 5.2)])
def test_bytes_per_entry(dtype: str, limit: float) -> None:
    """At 5 % of single elements, evenly spread and all in one corner of a large weight."""
    numel = 1 << 20
    generator = torch.Generator().manual_seed(0)
    spread = torch.randperm(numel, generator=generator)[: numel // 20].sort().values
    corners = torch.cat(
        [spread[: numel // 40] // 8, numel - 1 - (spread[: numel // 40] // 8).flip(0)]
    ).unique()
    for units in (spread, corners):
        layouts = {"w": UnitLayout((1024, 1024), 1)}
        mask = Mask({"w": units.to(torch.int32)}, layouts, "element")
        delta = Delta(mask, {"w": torch.zeros(len(units), dtype=DTYPES[dtype][0])}, "t")
        assert delta.nbytes / mask.num_entries <= limit


def test_bytes_on_disk(tmp_path: Path) -> None:
    model = base_model()
    delta = make_delta(model)
    delta.save(tmp_path / "d.safetensors")
    tensors = load_file(tmp_path / "d.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == delta.nbytes <= 6 * delta.mask.num_entries


def test_delta_of_another_model() -> None:
    delta = make_delta(base_model(family="qwen2"))
    model = base_model()
    before = model.full_state_dict()
    with pytest.raises(ValueError, match="in the model; give the mask that was made for this model"):
        with applied(model, delta):
            pass
    with pytest.raises(
        ValueError, match=r"holds torch.float32, the model torch.bfloat16; load the model in the same"
    ):
        with applied(base_model("bfloat16"), make_delta(model)):
            pass
    assert same_bits(model.full_state_dict(), before, "float32")


def test_values_must_fit_the_mask() -> None:
    delta = make_delta(base_model())
    short = {name: values[:-1] for name, values in delta.values.items()}
    with pytest.raises(ValueError, match="its values do not fit its mask"):
        Delta(delta.mask, short, "t")


def flip(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 4]) + content[-2:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-10], "corrupt delta file"),
        (lambda content: content[:4], "corrupt delta file"),
        (flip, "corrupt delta file"),
        (lambda content: b"", "corrupt delta file"),
    ],
)
def test_corrupt_file(damage: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    make_delta(base_model()).save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        Delta.load(path)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such delta file"):
        Delta.load(tmp_path / "d.safetensors")
    save_file({"w": torch.zeros(2)}, tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match="this is not a delta file"):
        Delta.load(tmp_path / "d.safetensors")
    make_delta(base_model()).mask.save(tmp_path / "mask.safetensors")
    with pytest.raises(ValueError, match="this is not a delta file"):
        Delta.load(tmp_path / "mask.safetensors")


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


def signature(task: str, seed: int) -> Signature:
    generator = torch.Generator().manual_seed(seed)
    return fit_signature(torch.randn(64, 8, generator=generator) + 10 * seed, 2, 0, task)


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


def test_creating_a_bank_empties_an_old_one(tmp_path: Path) -> None:
    bank = DeltaBank.create(tmp_path, "aaaa", layer=1)
    bank.add(signature("one", 1), make_delta(base_model(), "one"))
    DeltaBank.create(tmp_path, "aaaa", layer=1)
    assert DeltaBank(tmp_path).tasks == []
    assert not bank.path("one").exists()
