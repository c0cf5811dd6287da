"""The bank: what goes in comes out, and what does not belong there is refused."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bank.samples import base_model, drawn, make_delta, same_bits, same_delta, signature, small_delta

from trace_dist import DeltaBank
from trace_dist.bank.bank import BASE
from trace_dist.bank.delta import extract_delta
from trace_dist.bank.merge import merge
from trace_dist.bank.retrieval import Retriever
from trace_dist.bank.verify import verify
from trace_dist.models import fingerprint
from trace_dist.utils.sealed import json_checksum


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
    for value in (float("nan"), float("-inf")):
        name, values = next(iter(delta.values.items()))
        broken = replace(delta, values={**delta.values, name: torch.full_like(values, value)})
        with pytest.raises(ValueError, match=rf"delta 'one': holds infinite or NaN values .*{name}.*lower"):
            bank.add(signature("one", 1), broken)
        with pytest.raises(ValueError, match="infinite or NaN"):
            broken.save(tmp_path / "broken.safetensors")
    assert not (tmp_path / "broken.safetensors").exists()
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


def test_a_bank_stays_the_same_one_in_another_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two folders with a bank each: tasks were read out of the other one, and written into it."""
    for place, task in (("a", "one"), ("b", "two")):
        DeltaBank.create(tmp_path / place / "bank", "aaaa", layer=1).add(drawn(task, 1), small_delta(task, 1))
    monkeypatch.chdir(tmp_path / "a")
    bank = DeltaBank("bank")
    monkeypatch.chdir(tmp_path / "b")
    assert same_delta(bank.delta("one"), small_delta("one", 1))
    bank.add(drawn("three", 3), small_delta("three", 3))
    bank.reload()
    assert bank.tasks == ["one", "three"]
    assert DeltaBank("bank").tasks == ["two"]


def test_another_bank_of_the_same_generation_in_the_place_of_this_one(tmp_path: Path) -> None:
    for place, task in (("bank", "one"), ("new", "two"), ("third", "three")):
        DeltaBank.create(tmp_path / place, "aaaa", layer=1).add(drawn(task, 1), small_delta(task, 1))
    bank, third = DeltaBank(tmp_path / "bank"), DeltaBank(tmp_path / "third")
    shutil.rmtree(bank.folder)
    (tmp_path / "new").rename(bank.folder)
    with pytest.raises(
        ValueError, match=r"was changed since it was opened .* and 'one' is not there as it was"
    ):
        bank.delta("one")
    with pytest.raises(ValueError, match=r"was changed since it was opened .*; merge again"):
        merge(bank, third, tmp_path / "out")
    assert verify(bank) == []
    assert bank.tasks == ["two"]


def test_a_bank_whose_tasks_are_a_link(tmp_path: Path) -> None:
    """To another disk they are its own; where they are another bank's, each deleted what the other had added."""
    bank = DeltaBank.create(tmp_path / "bank", "aaaa", layer=1)
    bank.add(drawn("one", 1), small_delta("one", 1))
    (tmp_path / "link").mkdir()
    shutil.copy(bank.files.index, tmp_path / "link")
    (tmp_path / "link" / "tasks").symlink_to(bank.files.tasks)
    bank.add(drawn("two", 2), small_delta("two", 2))
    linked = DeltaBank(tmp_path / "link")
    assert same_delta(linked.delta("one"), bank.delta("one"))
    for change in (lambda: linked.remove("one"), lambda: linked.add(drawn("six", 6), small_delta("six", 6))):
        with pytest.raises(
            ValueError, match=r"its tasks are a link to those of the bank .*bank; change that one"
        ):
            change()
    assert verify(bank) == []
    bank.files.tasks.rename(tmp_path / "disk")
    bank.files.tasks.symlink_to(tmp_path / "disk")
    (tmp_path / "name").symlink_to(bank.folder)
    DeltaBank(tmp_path / "name").remove("one")
    bank.add(drawn("six", 6), small_delta("six", 6))
    assert bank.tasks == ["two", "six"]
    assert verify(bank) == []
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["six", "two"]


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


def test_how_prompts_are_pooled_stays_with_the_bank(tmp_path: Path) -> None:
    bank = DeltaBank.create(tmp_path / "one", "aaaa", 1, "mean_std")
    bank.add(drawn("a", 1), small_delta("a", 1))
    for found in (DeltaBank(bank.folder), DeltaBank.create(bank.folder, "aaaa", 1, "mean_std")):
        assert (found.layer, found.pooling, found.tasks) == (1, "mean_std", ["a"])
    with pytest.raises(ValueError, match=r"bank\.pooling='mean': .* made with mean_std; set that"):
        DeltaBank.create(bank.folder, "aaaa", 1)
    merged = merge(bank, DeltaBank.create(tmp_path / "two", "aaaa", 1, "mean_std"), tmp_path / "both")
    assert merged.pooling == "mean_std"
    index = json.loads(bank.files.index.read_text())
    # Releases that know the mean alone read versions 1 and 2.
    assert index["version"] == 3
    index["pooling"] = "median"
    del index["checksum"]
    bank.files.index.write_text(json.dumps({**index, "checksum": json_checksum(index)}))
    with pytest.raises(ValueError, match=r"damaged index of a bank .*the pooling 'median' is none"):
        DeltaBank(bank.folder)


def test_a_bank_of_means_is_as_before(tmp_path: Path) -> None:
    DeltaBank.create(tmp_path, "aaaa", layer=1)
    index = json.loads((tmp_path / "bank.json").read_text())
    assert index["version"] == 2
    assert "pooling" not in index
    assert DeltaBank(tmp_path).pooling == "mean"


def test_a_hundred_tasks_open_without_reading_one(tmp_path: Path) -> None:
    """Every file of every task is unreadable, and the bank still opens and tells what it holds."""
    bank = DeltaBank.create(tmp_path, "aaaa", layer=1)
    names = [f"task {index}" for index in range(100)]
    for index, name in enumerate(names):
        bank.add(drawn(name, index), small_delta(name, index), facts={"steps": index})
    assert bank.retrieve(torch.full((1, 8), 420.0)) == ["task 42"]
    for path in (tmp_path / "tasks").iterdir():
        shutil.rmtree(path)
    opened = DeltaBank(tmp_path)
    assert opened.tasks == names
    assert opened.generation == 100
    assert opened.facts("task 7")["training"] == {"steps": 7}
    assert opened.facts("task 7")["entries"] == 100
    assert opened.delta_bytes("task 7") > 500
    with pytest.raises(ValueError, match="no such delta file"):
        opened.delta("task 7")


def test_signatures_are_read_once_each(tmp_path: Path) -> None:
    bank = DeltaBank.create(tmp_path, "aaaa", layer=1)
    x = torch.stack([torch.full((8,), 10.0 * seed) for seed in range(3)])
    for seed in range(2):
        bank.add(drawn(f"t{seed}", seed), small_delta(f"t{seed}", seed))
    bank.retrieve(x)
    for path in (tmp_path / "tasks").glob("*/signature.safetensors"):
        path.write_bytes(b"")
    bank.add(drawn("t2", 2), small_delta("t2", 2))
    assert bank.retrieve(x) == ["t0", "t1", "t2"]
    fresh = Retriever(drawn(f"t{seed}", seed) for seed in range(3))
    assert torch.equal(bank.retriever.scores(x), fresh.scores(x))


def test_an_index_that_is_put_back_needs_no_file(tmp_path: Path) -> None:
    """A new task is damaged, and the files of one that was seen before are gone."""
    writer = DeltaBank.create(tmp_path, "aaaa", layer=1)
    x = torch.stack([torch.full((8,), 10.0 * seed) for seed in range(3)])
    for seed in range(3):
        writer.add(drawn(f"t{seed}", seed), small_delta(f"t{seed}", seed))
    reader = DeltaBank(tmp_path)
    before, found = reader.index, reader.retriever.scores(x)
    writer.remove("t1")
    writer.add(drawn("t3", 3), small_delta("t3", 3))
    writer.path("t3").with_name("signature.safetensors").write_bytes(b"")
    reader.reload()
    with pytest.raises(ValueError, match="signature"):
        reader.retrieve(x)
    reader.reload(before)
    assert torch.equal(reader.retriever.scores(x), found)
    assert reader.retrieve(x) == ["t0", "t1", "t2"]


@pytest.mark.parametrize("name", ["base", "Base"])
def test_a_task_called_base(name: str, tmp_path: Path) -> None:
    bank = DeltaBank.create(tmp_path, "aaaa", layer=1)
    with pytest.raises(ValueError, match="is reserved for the base model"):
        bank.add(drawn(name, 1), small_delta(name, 1))
    assert bank.tasks == []


def test_folders_are_safe_whatever_the_name(tmp_path: Path) -> None:
    bank = DeltaBank.create(tmp_path, "aaaa", layer=1)
    names = ["Copy", "copy", "COPY", "ü", "数学", "a b", "a-b", "a_b", "x" * 150, "con?*|<>:", "base 2"]
    for seed, name in enumerate(names):
        bank.add(drawn(name, seed), small_delta(name, seed))
    folders = [path.name for path in (tmp_path / "tasks").iterdir()]
    assert len({folder.casefold() for folder in folders}) == len(names)
    assert all(re.fullmatch(r"[a-z0-9_-]{1,60}", folder) for folder in folders)
    assert "copy" in folders
    assert DeltaBank(tmp_path).tasks == names
    for seed, name in enumerate(names):
        assert same_delta(bank.delta(name), small_delta(name, seed))
