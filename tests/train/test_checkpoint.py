"""Checkpoints that are damaged, of another run, or do not fit on the disk: one clear error, and the older one intact."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine.cases import CASES, batches

from trace_dist import Mask, MaskedAdamW, shard
from trace_dist.train.checkpoint import latest_checkpoint, load_checkpoint, load_mask, save_checkpoint

CASE = CASES["element"]
IDS = batches(CASE)[0][0]
Usage = namedtuple("Usage", "total used free")


def make(seed: int = 0, **meta: str) -> MaskedAdamW:
    model = shard(CASE.model(), "single")
    return MaskedAdamW(model, Mask.random(model, 0.3, "element", seed=seed).with_meta(**meta))


def step(optimizer: MaskedAdamW, count: int = 1) -> None:
    for _ in range(count):
        optimizer.model.backward(optimizer.model(input_ids=IDS, labels=IDS).loss)
        optimizer.step()
        optimizer.zero_grad()


def assert_equal(one: MaskedAdamW, other: MaskedAdamW) -> None:
    for (_, my_state), (_, state) in zip(one.compact(), other.compact(), strict=True):
        assert torch.equal(my_state["exp_avg"], state["exp_avg"])
        assert torch.equal(my_state["exp_avg_sq"], state["exp_avg_sq"])
        assert my_state["step"] == state["step"]
    assert all(map(torch.equal, one.model.module.parameters(), other.model.module.parameters()))


def test_round_trip(tmp_path: Path) -> None:
    optimizer = make()
    step(optimizer, 3)
    folder = save_checkpoint(tmp_path, 3, optimizer, {"schedule": {"epoch": 3}})
    assert load_mask(folder).digest() == optimizer.mask.digest()
    other = make()
    manifest = load_checkpoint(folder, other)
    assert manifest["step"] == 3
    assert manifest["state"] == {"schedule": {"epoch": 3}}
    assert_equal(other, optimizer)


def test_only_the_newest_is_kept(tmp_path: Path) -> None:
    optimizer = make()
    for number in (1, 2, 3):
        step(optimizer)
        save_checkpoint(tmp_path, number, optimizer, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_the_new_one_is_kept_beside_remains_of_a_later_one(tmp_path: Path) -> None:
    """After a crash a later folder may lie there without a manifest; it must not outlive what is saved now."""
    optimizer = make()
    step(optimizer)
    first = save_checkpoint(tmp_path, 1, optimizer, {})
    (tmp_path / "step-00000009").mkdir()
    (tmp_path / ".step-00000007.partial").mkdir()
    assert latest_checkpoint(tmp_path) == first
    second = save_checkpoint(tmp_path, 2, optimizer, {})
    assert latest_checkpoint(tmp_path) == second
    assert list(tmp_path.iterdir()) == [second]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    optimizer = make()
    save_checkpoint(tmp_path, 1, optimizer, {})
    step(optimizer)
    other = make()
    load_checkpoint(save_checkpoint(tmp_path, 1, optimizer, {}), other)
    assert_equal(other, optimizer)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: flip_a_bit(f / "rank-00000.safetensors"),
            "rank-00000.safetensors: missing or damaged; delete",
        ),
        (lambda f: (f / "rank-00000.safetensors").write_bytes(b""), "missing or damaged"),
        (lambda f: (f / "rank-00000.safetensors").unlink(), "missing or damaged"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json: no such file"),
        (lambda f: (f / "manifest.json").write_text('{"format": '), "manifest.json: not valid JSON"),
        (lambda f: (f / "manifest.json").write_text("[]"), "not a version 2 trace_dist checkpoint"),
        (
            lambda f: (f / "manifest.json").write_text('{"format": "x"}'),
            "not a version 2 trace_dist checkpoint",
        ),
    ],
)
def test_damage_is_one_clear_error(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    """And nothing has been loaded by then."""
    optimizer = make()
    step(optimizer)
    folder = save_checkpoint(tmp_path, 1, optimizer, {})
    damage(folder)
    other = make()
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(folder, other)
    assert "\n" not in str(caught.value)
    assert_equal(other, make())


def test_a_checkpoint_without_manifest_is_passed_over(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 1, make(), {})
    shutil.copytree(folder, tmp_path / "step-00000002")
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    assert latest_checkpoint(tmp_path) == folder
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_another_mask_and_another_model(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 1, make(seed=0, model="aaaa"), {})
    with pytest.raises(ValueError, match="the checkpoint is of another mask; resume with"):
        load_checkpoint(folder, make(seed=1))
    with pytest.raises(ValueError, match="is of model aaaa, but the mask of bbbb"):
        load_checkpoint(folder, make(seed=0, model="bbbb"))
    load_checkpoint(folder, make(seed=0, model="aaaa"))
    assert json.loads((folder / "manifest.json").read_text())["model"] == "aaaa"


def test_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = make()
    step(optimizer)
    older = save_checkpoint(tmp_path, 1, optimizer, {})
    saved = make()
    load_checkpoint(older, saved)
    step(optimizer)
    needed = 12 * optimizer.mask.num_entries
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, needed))
    with pytest.raises(
        ValueError, match=r"MiB are needed but .* MiB are free; free some disk space"
    ) as caught:
        save_checkpoint(tmp_path, 2, optimizer, {})
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [older]
    again = make()
    load_checkpoint(older, again)
    assert_equal(again, saved)
