"""Banks of version 1 are read as they are, and upgraded by the first change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bank.samples import drawn, same_delta, small_delta, write_old_bank

from trace_dist import DeltaBank
from trace_dist.bank.bank import BASE
from trace_dist.bank.signature import TENSORS
from trace_dist.bank.verify import verify

NAMES = (BASE, "one", "two three")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pairs = [
        (drawn(name, seed), small_delta(name, seed) if seed else None) for seed, name in enumerate(NAMES)
    ]
    write_old_bank(tmp_path, pairs)
    return tmp_path


def check(bank: DeltaBank, names: tuple[str, ...] = NAMES) -> None:
    assert bank.tasks == list(names)
    assert (bank.base, bank.layer) == ("aaaa", 1)
    assert bank.retrieve(torch.full((1, 8), 20.0)) == ["two three"]
    for seed, name in enumerate(NAMES):
        for tensor in TENSORS:
            assert torch.equal(getattr(bank.signature(name), tensor), getattr(drawn(name, seed), tensor))
        assert same_delta(bank.delta(name), small_delta(name, seed) if seed else None)
        assert bank.facts(name)["clusters"] == 2
        assert bank.sketch(name) is None
    assert bank.mask("one") == small_delta("one", 1).mask
    assert bank.facts("one")["entries"] == 100
    assert verify(bank) == []


def test_reading_changes_nothing(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    check(DeltaBank(folder))
    check(DeltaBank.create(folder, "aaaa", layer=1))
    assert sorted(folder.rglob("*")) == before


def test_the_first_change_upgrades(folder: Path) -> None:
    old = folder / "deltas" / "one.safetensors"
    content, file = old.read_bytes(), old.stat().st_ino
    reader, bank = DeltaBank(folder), DeltaBank(folder)
    bank.add(drawn("four", 4), small_delta("four", 4))
    check(bank, (*NAMES, "four"))
    check(DeltaBank(folder), (*NAMES, "four"))
    assert bank.path("one") == folder / "tasks" / "one" / "delta.safetensors"
    assert bank.path("one").read_bytes() == content
    assert bank.path("one").stat().st_ino == file
    kept = {path.name for path in folder.iterdir()}
    assert kept == {".generation", "bank.json", "tasks"}
    # a reader from before the upgrade goes on reading
    check(reader)


def test_adding_again_what_an_old_bank_holds(folder: Path) -> None:
    bank = DeltaBank(folder)
    bank.add(drawn("one", 1), small_delta("one", 1))
    assert bank.tasks == list(NAMES)
    with pytest.raises(ValueError, match="already, with another signature;"):
        bank.add(drawn("one", 7), small_delta("one", 1))
    check(DeltaBank(folder))


def test_a_file_system_without_hard_links(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    content = (folder / "deltas" / "one.safetensors").read_bytes()
    bank = DeltaBank(folder)
    bank.rename("one", "uno")
    assert bank.path("uno").read_bytes() == content
    assert bank.tasks == [BASE, "uno", "two three"]


def test_a_delta_of_a_task_called_base(folder: Path) -> None:
    small_delta(BASE, 5).save(folder / "deltas" / "base.safetensors")
    with pytest.raises(ValueError, match=r"base\.safetensors: a task called 'base'.*delete this file"):
        DeltaBank(folder)


def test_an_old_bank_without_a_task(tmp_path: Path) -> None:
    write_old_bank(tmp_path, [])
    (tmp_path / "signatures.safetensors").unlink()
    bank = DeltaBank(tmp_path)
    assert bank.tasks == []
    bank.add(drawn("one", 1), small_delta("one", 1))
    assert DeltaBank(tmp_path).tasks == ["one"]
