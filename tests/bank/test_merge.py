"""The union of two banks."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bank.samples import drawn, same_delta, small_delta, write_old_bank

from trace_dist import DeltaBank
from trace_dist.bank.bank import BASE
from trace_dist.bank.merge import merge
from trace_dist.bank.prompts import Prompts
from trace_dist.bank.sketch import sketch_update
from trace_dist.bank.verify import verify
from trace_dist.data.encoding import Pair


def bank_of(folder: Path, *tasks: tuple[str, int], layer: int = 1, base: str = "aaaa") -> DeltaBank:
    bank = DeltaBank.create(folder, base, layer)
    for name, seed in tasks:
        if name == BASE:
            bank.add(drawn(BASE, seed), None)
            continue
        sketch = sketch_update({"w": torch.full((4,), float(seed))}, 0)
        bank.add(drawn(name, seed), small_delta(name, seed, model=base), sketch, {"steps": seed})
    return bank


def test_union(tmp_path: Path) -> None:
    left = bank_of(tmp_path / "a", (BASE, 0), ("one", 1), ("both", 4))
    right = bank_of(tmp_path / "b", (BASE, 0), ("both", 4), ("Two!", 2))
    right.rename("Two!", "two")
    (tmp_path / "c").mkdir()
    found = merge(left, right, tmp_path / "c")
    assert found.tasks == [BASE, "one", "both", "two"]
    assert verify(found) == []
    assert found.path("two").parent.name == "two"
    for bank, name in ((left, "one"), (left, "both"), (right, "two")):
        assert found.path(name).read_bytes() == bank.path(name).read_bytes()
        assert found.facts(name) == bank.facts(name)
        assert torch.equal(found.sketch(name).values["w"], bank.sketch(name).values["w"])  # type: ignore[union-attr]
    found.remove("one")
    assert same_delta(left.delta("one"), small_delta("one", 1))


def test_with_an_old_bank(tmp_path: Path) -> None:
    write_old_bank(
        tmp_path / "old", [(drawn("one", 1), small_delta("one", 1)), (drawn("x y", 3), small_delta("x y", 3))]
    )
    old, new = DeltaBank(tmp_path / "old"), bank_of(tmp_path / "new", ("two", 2))
    for pair, names in (((old, new), ["one", "x y", "two"]), ((new, old), ["two", "one", "x y"])):
        found = merge(*pair, tmp_path / "+".join(names))
        assert found.tasks == names
        assert verify(found) == []
        assert same_delta(found.delta("x y"), small_delta("x y", 3))
        assert found.facts("x y")["entries"] == 100
    assert DeltaBank(tmp_path / "old").index.version == 1


def test_refusals(tmp_path: Path) -> None:
    left = bank_of(tmp_path / "a", ("one", 1), (BASE, 0))
    out = tmp_path / "out"
    for other, words in (
        (
            bank_of(tmp_path / "b", ("one", 2)),
            "task='one': in .*/a and another one in .*/b; rename it in one",
        ),
        (bank_of(tmp_path / "c", (BASE, 2)), "task='base': .*; remove one of the two"),
        (
            bank_of(tmp_path / "d", base="bbbb"),
            "of the base model bbbb and layer 1, mean, but .* of aaaa and layer 1, mean",
        ),
        (bank_of(tmp_path / "e", layer=2), "merge banks of one base model"),
        (
            DeltaBank.create(tmp_path / "g", "aaaa", 1, "max"),
            "layer 1, max, but .* layer 1, mean; merge banks",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            merge(left, other, out)
    fine = bank_of(tmp_path / "f", ("two", 2))
    with pytest.raises(ValueError, match="holds something already; choose a new folder"):
        merge(left, fine, tmp_path / "a")
    with pytest.raises(ValueError, match="lies in the folder of the other bank"):
        merge(left, fine, tmp_path / "f" / "tasks" / "out")
    content = fine.path("two").read_bytes()
    fine.path("two").write_bytes(content[:-1] + b"x")
    with pytest.raises(ValueError, match=r"two/delta\.safetensors: corrupt delta file"):
        merge(left, fine, out)
    fine.path("two").unlink()
    with pytest.raises(ValueError, match=r"two/delta\.safetensors: no such file; restore it"):
        merge(left, fine, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == list("abcdefg")


def test_a_twin_that_is_damaged_or_gone_is_the_same_task(tmp_path: Path) -> None:
    """It was called another task, to be renamed, or ended in the system's own words."""
    whole, other = bank_of(tmp_path / "a", ("one", 1)), bank_of(tmp_path / "b", ("one", 1), ("two", 2))
    path = other.path("one")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    for number, reason in enumerate(("corrupt delta file", "no such file; restore it from a copy")):
        # What is copied is the first one's.
        found = merge(whole, other, tmp_path / f"out{number}")
        assert verify(found) == []
        with pytest.raises(ValueError, match=rf"b/tasks/one/delta\.safetensors: {reason}"):
            merge(other, whole, tmp_path / "none")
        path.unlink(missing_ok=True)
    assert not (tmp_path / "none").exists()


def test_files_of_a_bank_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new bank can be written, and the error says nothing else."""
    left, right, opened = bank_of(tmp_path / "a", ("one", 1)), bank_of(tmp_path / "b", ("two", 2)), Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == right.path("two"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(
        ValueError, match=r"two/delta\.safetensors: the delta file cannot be read \(Permission"
    ):
        merge(left, right, tmp_path / "out")


def test_what_one_of_them_keeps_of_a_task_is_kept(tmp_path: Path) -> None:
    """The left bank has the task alone, the right one a sketch beside it, and prompts of the base."""
    left, right = DeltaBank.create(tmp_path / "a", "aaaa", 1), bank_of(tmp_path / "b", ("one", 1))
    left.add(drawn(BASE, 0), None)
    left.add(drawn("one", 1), small_delta("one", 1, model="aaaa"))
    prompts = {"plain": Prompts([Pair([1, 2], [])], 3)}
    right.add(drawn(BASE, 0), None, prompts=prompts)
    for number, pair in enumerate(((left, right), (right, left))):
        found = merge(*pair, tmp_path / f"out{number}")
        assert found.sketch("one") is not None
        assert found.prompts(BASE) == prompts
        assert verify(found) == []


def test_tasks_of_another_data_type_are_refused(tmp_path: Path) -> None:
    """One model answers for all of a bank, and values go into a model of their data type alone."""
    bank, task = bank_of(tmp_path / "a", ("one", 1)), small_delta("two", 2)
    other = replace(task, values={name: values.bfloat16() for name, values in task.values.items()})
    with pytest.raises(ValueError, match=r"^delta 'two': holds bfloat16: the tasks of .*/a are float32, and"):
        bank.add(drawn("two", 2), other)
    with pytest.raises(
        ValueError, match=r"^target\.dtype='bfloat16': the tasks of the bank .*/a are float32"
    ):
        bank.check_dtype("bfloat16")
    bank.check_dtype("float32")
    assert bank.tasks == ["one"]
    apart = DeltaBank.create(tmp_path / "b", "aaaa", 1)
    apart.check_dtype("bfloat16")
    apart.add(drawn("two", 2), other)
    with pytest.raises(ValueError, match=r"^task='two': holds bfloat16: the tasks of .*/a are float32"):
        merge(bank, apart, tmp_path / "out")
    assert not (tmp_path / "out").exists()
