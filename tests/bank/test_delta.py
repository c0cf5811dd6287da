"""Deltas: exact values, small files, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bank.samples import DTYPES, base_model, bits, make_delta, same_bits
from masks.earlier import earlier_digest
from safetensors.torch import load_file, save_file

from trace_dist import Delta, Mask
from trace_dist.bank.delta import Snapshot, applied, extract_delta
from trace_dist.masks import UnitLayout


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


def test_a_mask_that_an_earlier_release_has_named(tmp_path: Path) -> None:
    """By the digest of its indices: in the index of a bank, or in the file itself."""
    delta = make_delta(base_model())
    delta.save(tmp_path / "one.safetensors")
    assert Delta.load_mask(tmp_path / "one.safetensors", earlier_digest(delta.mask)) == delta.mask
    other = make_delta(base_model(), density=0.3).mask
    with pytest.raises(ValueError, match="wrong checksum of its mask"):
        Delta.load_mask(tmp_path / "one.safetensors", earlier_digest(other))


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
