"""Checkpoints that are damaged, of another run, or do not fit on the disk: one clear error, and the older one intact."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.cases import CASES, batches
from full_disk import full_disk
from masks.earlier import earlier_digest

from trace_dist import Mask, MaskedAdamW, shard
from trace_dist.checkpoint import latest_checkpoint, load_checkpoint, load_mask, save_checkpoint
from trace_dist.checkpoint.format import MANIFEST, MASK
from trace_dist.config import StateDtype

CASE = CASES["element"]
IDS = batches(CASE)[0][0]
Usage = namedtuple("Usage", "total used free")


def make(seed: int = 0, state_dtype: StateDtype = "float32", **meta: str) -> MaskedAdamW:
    model = shard(CASE.model(), "single")
    mask = Mask.random(model, 0.3, "element", seed=seed).with_meta(**meta)
    return MaskedAdamW(model, mask, state_dtype=state_dtype)


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


def test_what_an_earlier_release_has_kept(tmp_path: Path) -> None:
    """A checkpoint and an optimizer state that name the mask by the digest of then."""
    optimizer = make()
    step(optimizer)
    folder = save_checkpoint(tmp_path, 1, optimizer, {})
    digest = earlier_digest(optimizer.mask)
    change(lambda m: m.update(mask_digest=digest), sign=True)(folder)
    by_file, by_state = make(), make()
    load_checkpoint(folder, by_file)
    by_state.load_state_dict(optimizer.state_dict() | {"mask_digest": digest})
    assert_equal(by_file, optimizer)
    assert_equal(by_state, optimizer)
    with pytest.raises(ValueError, match="of another mask"):
        load_checkpoint(folder, make(seed=1))


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    optimizer = make()
    for number in (1, 2, 3):
        step(optimizer)
        save_checkpoint(tmp_path, number, optimizer, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


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
    assert sorted(tmp_path.iterdir()) == [first, second]


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


def change(content: Callable[[dict], object], sign: bool = False) -> Callable[[Path], object]:
    """Damage that changes the manifest, with or without a checksum that fits."""

    def damage(folder: Path) -> None:
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        content(manifest)
        if sign:
            del manifest["sha256"]
            manifest["sha256"] = checksum(manifest)
        path.write_text(json.dumps(manifest))

    return damage


def checksum(manifest: dict) -> str:
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "manifest.json").write_text(text)


def shorten(entry: dict) -> None:
    entry["intervals"] = {name: [0, 1] for name in entry["intervals"]}


MANIFEST_DAMAGED = "manifest.json: missing or damaged; delete"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit": (
        lambda f: flip_a_bit(f / "rank-00000.safetensors"),
        "rank-00000.safetensors: missing or damaged",
    ),
    "a bit of the mask": (
        lambda f: flip_a_bit(f / "mask.safetensors"),
        "mask.safetensors: missing or damaged",
    ),
    "empty": (lambda f: (f / "rank-00000.safetensors").write_bytes(b""), "missing or damaged"),
    "gone": (lambda f: (f / "rank-00000.safetensors").unlink(), "missing or damaged"),
    "a folder": (
        lambda f: ((f / "mask.safetensors").unlink(), (f / "mask.safetensors").mkdir()),
        "mask.safetensors: missing or damaged",
    ),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json: no such file"),
    "cut short": (write('{"format": '), "manifest.json: not valid JSON"),
    "no text": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe{"), "manifest.json: not valid JSON"),
    "deep": (write("[" * 10**6), "manifest.json: not valid JSON"),
    "deep inside": (
        write(
            '{"format": "trace_dist.checkpoint", "version": 3, "state": ' + '{"a":' * 900 + "1" + "}" * 901
        ),
        MANIFEST_DAMAGED,
    ),
    "long number": (write('{"step": ' + "9" * 10**4 + "}"), "manifest.json: not valid JSON"),
    "a list": (write("[]"), "not a version 3 or 4 trace_dist checkpoint"),
    "another format": (write('{"format": "x"}'), "not a version 3 or 4 trace_dist checkpoint"),
    "nothing else": (write('{"format": "trace_dist.checkpoint", "version": 3}'), MANIFEST_DAMAGED),
    "nothing else, old": (write('{"format": "trace_dist.checkpoint", "version": 2}'), MANIFEST_DAMAGED),
    "step": (change(lambda m: m.update(step=7)), MANIFEST_DAMAGED),
    "state": (change(lambda m: m["state"]["schedule"].update(epoch=4)), MANIFEST_DAMAGED),
    "param_steps": (
        change(lambda m: m["param_steps"].update(dict.fromkeys(m["param_steps"], 9))),
        MANIFEST_DAMAGED,
    ),
    "version": (change(lambda m: m.update(version=2)), MANIFEST_DAMAGED),
    "checksum": (change(lambda m: m.pop("sha256")), MANIFEST_DAMAGED),
    "text for step": (change(lambda m: m.update(step="1"), sign=True), MANIFEST_DAMAGED),
    "text for intervals": (
        change(lambda m: m["files"].update({"rank-00000.safetensors": "x"}), sign=True),
        MANIFEST_DAMAGED,
    ),
    "another file": (
        change(lambda m: m["files"].update({"../x": m["files"]["mask.safetensors"]}), sign=True),
        MANIFEST_DAMAGED,
    ),
    "fewer entries": (
        change(lambda m: shorten(m["files"]["rank-00000.safetensors"]), sign=True),
        MANIFEST_DAMAGED,
    ),
    "a list for steps": (change(lambda m: m.update(param_steps=[]), sign=True), MANIFEST_DAMAGED),
    "no steps": (change(lambda m: m.update(param_steps={}), sign=True), MANIFEST_DAMAGED),
    "no digest": (change(lambda m: m.pop("mask_digest"), sign=True), "of another mask"),
    "a list for files": (change(lambda m: m.update(files=[]), sign=True), MANIFEST_DAMAGED),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_one_clear_error(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    """And nothing has been loaded by then."""
    optimizer = make()
    step(optimizer)
    folder = save_checkpoint(tmp_path, 1, optimizer, {"schedule": {"epoch": 3}})
    damage(folder)
    other = make()
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(folder, other)
    assert "\n" not in str(caught.value)
    assert_equal(other, make())


@pytest.mark.parametrize(
    "name", ["a bit", "a bit of the mask", "empty", "gone", "cut short", "deep", "step", "state", "a list"]
)
def test_a_damaged_newest_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    """With a warning; and it outlives no newer checkpoint."""
    optimizer = make()
    folders = [save_checkpoint(tmp_path, n, optimizer, {"schedule": {"epoch": n}}) for n in (1, 2)]
    DAMAGE[name][0](folders[1])
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == folders[0]
    assert str(folders[1]) in caplog.text
    assert "the checkpoint before it is used" in caplog.text
    third = save_checkpoint(tmp_path, 3, optimizer, {})
    assert latest_checkpoint(tmp_path) == third


def test_remains_of_a_damaged_one_do_not_count(tmp_path: Path) -> None:
    optimizer = make()
    first = save_checkpoint(tmp_path, 1, optimizer, {})
    DAMAGE["step"][0](save_checkpoint(tmp_path, 2, optimizer, {}))
    third = save_checkpoint(tmp_path, 3, optimizer, {})
    assert sorted(tmp_path.iterdir()) == [first, third]


def test_all_are_damaged(tmp_path: Path) -> None:
    flip_a_bit(save_checkpoint(tmp_path, 1, make(), {}) / "rank-00000.safetensors")
    assert latest_checkpoint(tmp_path) is None


def test_another_version_is_not_damage(tmp_path: Path) -> None:
    """It is refused, never passed over: training that began anew would delete it."""
    change(lambda m: m.update(version=5), sign=True)(save_checkpoint(tmp_path, 1, make(), {}))
    with pytest.raises(ValueError, match="not a version 3 or 4 trace_dist checkpoint"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("name", [MANIFEST, MASK, "rank-00000.safetensors"])
@pytest.mark.parametrize("code", [errno.EACCES, errno.EMFILE, errno.ESTALE])
def test_what_cannot_be_read_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    """It is never passed over: training that went on from an older one would delete it."""
    folder, opened = save_checkpoint(tmp_path, 1, make(), {}), Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == folder / name:
            raise OSError(code, os.strerror(code), str(path))
        return opened(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        for read in (lambda: latest_checkpoint(tmp_path), lambda: load_checkpoint(folder, make())):
            with pytest.raises(ValueError, match=rf"{name}: cannot be read \({os.strerror(code)}\); mend"):
                read()
    assert latest_checkpoint(tmp_path) == folder


def test_version_2_is_read(tmp_path: Path) -> None:
    """It had neither kind nor checksum, and did not list the mask."""
    optimizer = make()
    step(optimizer)
    folder = save_checkpoint(tmp_path, 1, optimizer, {"schedule": {"epoch": 3}})

    def back(manifest: dict) -> None:
        del manifest["kind"], manifest["sha256"], manifest["files"]["mask.safetensors"]
        manifest["version"] = 2

    change(back)(folder)
    other = make()
    assert latest_checkpoint(tmp_path) == folder
    assert load_checkpoint(folder, other)["step"] == 1
    assert_equal(other, optimizer)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("part", ["weights", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_replaces_nothing(
    tmp_path: Path, state_dtype: StateDtype, part: str, value: float
) -> None:
    optimizer = make(state_dtype=state_dtype)
    step(optimizer)
    folder = save_checkpoint(tmp_path, 1, optimizer, {})
    support, state = optimizer.compact()[2]
    if part == "weights":
        optimizer.set_values([torch.full_like(v, value) for v in map(optimizer.values, optimizer.supports)])
    else:
        state.get(f"{part}_absmax", state[part])[-1] = value
    with pytest.raises(
        ValueError, match="is not finite, and nothing was written; lower the learning rate"
    ) as caught:
        save_checkpoint(tmp_path, 2, optimizer, {})
    assert "\n" not in str(caught.value)
    assert part == "weights" or support.name in str(caught.value)
    assert list(tmp_path.iterdir()) == [folder]


def test_the_folder_is_on_the_disk_before_it_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files, then the folder that names them, then the new name, then its folder; older ones go last."""
    events: list[str] = []
    optimizer = make()
    for number in (1, 2):
        save_checkpoint(tmp_path, number, optimizer, {})
    sync, rename, remove = os.fsync, Path.rename, shutil.rmtree

    def fsync(handle: int) -> None:
        events.append("sync " + Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        sync(handle)

    def renamed(self: Path, target: Path) -> Path:
        events.append(f"rename {target.name}")
        return rename(self, target)

    def removed(path: Path, **options: bool) -> None:
        events.append(f"remove {path.name}")
        remove(path, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(shutil, "rmtree", removed)
    save_checkpoint(tmp_path, 3, optimizer, {})
    assert any("manifest" in event for event in events[:-4])
    assert events[-4:] == [
        "sync .step-00000003.partial",
        "rename step-00000003",
        f"sync {tmp_path.name}",
        "remove step-00000001",
    ]


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


def test_what_a_killed_writer_left_gives_its_room_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is hidden: nobody would know what to delete."""
    optimizer = make()
    left = tmp_path / ".step-00000001.partial"
    left.mkdir()
    (left / "rank-00000.safetensors").write_bytes(b"0" * 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 0 if left.exists() else 10**9))
    folder = save_checkpoint(tmp_path, 2, optimizer, {})
    assert list(tmp_path.iterdir()) == [folder]


def test_a_disk_that_fills_up_meanwhile_keeps_nothing_of_it(tmp_path: Path) -> None:
    optimizer = make()
    step(optimizer)
    older = save_checkpoint(tmp_path, 1, optimizer, {})
    with full_disk(), pytest.raises(ValueError, match="cannot be written"):
        save_checkpoint(tmp_path, 2, optimizer, {})
    assert list(tmp_path.iterdir()) == [older]
