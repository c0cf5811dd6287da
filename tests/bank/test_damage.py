"""What is damaged or was made to mislead is refused in one line, whichever byte it is."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bank.samples import drawn, same_delta, small_delta, write_old_bank
from safetensors.torch import load_file, save_file

from trace_dist import Delta, DeltaBank
from trace_dist.bank.bank import BASE
from trace_dist.bank.index import Index
from trace_dist.bank.signature import Signature
from trace_dist.bank.sketch import Sketch, sketch_update
from trace_dist.bank.verify import verify
from trace_dist.utils.files import sha256
from trace_dist.utils.sealed import json_checksum, tensors_checksum


@pytest.fixture
def bank(tmp_path: Path) -> DeltaBank:
    bank = DeltaBank.create(tmp_path / "bank", "aaaa", layer=1)
    bank.add(drawn(BASE, 0), None)
    bank.add(drawn("one", 1), small_delta("one", 1), sketch_update({"w": torch.ones(5)}, 0))
    return bank


def refused(read: Callable[[], object], words: str | None = None) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read()
    assert "\n" not in str(caught.value)


def outcome(read: Callable[[], object]) -> object:
    """What is read, or the one line that refuses it."""
    try:
        return read()
    except ValueError as error:
        return str(error)


def flipped(content: bytes, seed: int, times: int = 150) -> list[bytes]:
    """Copies with one bit turned, at places all over the file."""
    chosen = random.Random(seed)
    places = [min(len(content) - 1, len(content) * number // times) for number in range(times)]
    return [
        content[:place] + bytes([content[place] ^ 1 << chosen.randrange(8)]) + content[place + 1 :]
        for place in places
    ]


def test_a_bit_of_the_index(bank: DeltaBank) -> None:
    path = bank.files.index
    for content in flipped(path.read_bytes(), 0, 400):
        path.write_bytes(content)
        refused(lambda: DeltaBank(bank.folder), "bank.json")


@pytest.mark.parametrize("kind", ["delta", "signature", "sketch"])
def test_a_bit_of_a_file(kind: str, bank: DeltaBank) -> None:
    path = bank.files.task("one") / f"{kind}.safetensors"
    read = {"delta": bank.delta, "signature": bank.signature, "sketch": bank.sketch}[kind]
    for content in flipped(path.read_bytes(), 1):
        path.write_bytes(content)
        refused(lambda: read("one"), kind)
        if kind == "signature":
            refused(lambda: DeltaBank(bank.folder).retriever, kind)
        [problem] = verify(bank)
        assert str(path) in problem


def test_a_bit_of_a_file_by_itself(bank: DeltaBank) -> None:
    """Outside a bank no index knows the file's checksum; it has its own."""
    readers: dict[str, Callable[[Path], Any]] = {
        "delta": Delta.load,
        "signature": Signature.load,
        "sketch": Sketch.load,
    }
    survived = 0
    for kind, load in readers.items():
        path = bank.files.task("one") / f"{kind}.safetensors"
        whole = load(path)
        for content in flipped(path.read_bytes(), 2, 400):
            path.write_bytes(content)
            found = outcome(lambda load=load, path=path: load(path))
            # nothing notices a bit of the name of the header's own checksum, and nothing is lost by it
            assert isinstance(found, str) or type(found) is type(whole)
            survived += not isinstance(found, str)
    assert survived < 20


def test_the_mask_of_a_damaged_file(bank: DeltaBank) -> None:
    """The mask is either as it was or refused; a bit of the values is not its business."""
    path, whole = bank.path("one"), bank.mask("one")
    refusals = 0
    for content in flipped(path.read_bytes(), 3, 400):
        path.write_bytes(content)
        found = outcome(lambda: bank.mask("one"))
        assert isinstance(found, str) or found == whole
        refusals += isinstance(found, str)
    assert refusals > 100


def test_files_that_are_missing_cut_or_swapped(bank: DeltaBank) -> None:
    bank.add(drawn("two", 2), small_delta("two", 2))
    delta, other = bank.path("one"), bank.path("two")
    whole = delta.read_bytes()
    delta.write_bytes(other.read_bytes())
    refused(lambda: bank.delta("one"), "its bytes are not those that were written")
    refused(lambda: bank.mask("one"), "wrong checksum of its mask")
    for content in (whole[:-10], whole[:4], b""):
        delta.write_bytes(content)
        refused(lambda: bank.delta("one"), "corrupt delta file")
        assert "bytes, not" in verify(bank)[0]
    delta.unlink()
    refused(lambda: bank.delta("one"), "no such delta file")
    shutil.rmtree(bank.files.task(BASE))
    assert len(verify(bank)) == 2
    delta.parent.joinpath("delta.safetensors").mkdir()
    assert len(verify(bank)) == 2


def test_files_that_the_system_does_not_let_be_read(bank: DeltaBank, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not damaged, and safetensors says of them that they are missing."""
    opened = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.suffix == ".safetensors":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    path = bank.path("one")
    monkeypatch.setattr(Path, "open", refuse)
    words = r"the {} file cannot be read \(Permission denied\); fix its permissions"
    for read in (bank.delta, bank.mask, lambda _: Delta.load(path), lambda _: Delta.load_mask(path)):
        refused(lambda read=read: read("one"), words.format("delta"))
    refused(lambda: DeltaBank(bank.folder).retriever, words.format("signature"))
    assert all("cannot be read (Permission denied)" in problem for problem in verify(bank))


def test_a_task_that_is_removed_while_it_is_read(bank: DeltaBank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look whether a file is there, and the reading of it."""
    for file in ("delta", "signature", "sketch"):
        writer, reader = DeltaBank(bank.folder), DeltaBank(bank.folder)

        def removed(path: Path, writer: DeltaBank = writer) -> str:
            writer.remove("one")
            return sha256(path)

        with monkeypatch.context() as patched:
            patched.setattr("trace_dist.utils.sealed.sha256", removed)
            refused(lambda reader=reader, file=file: getattr(reader, file)("one"), "was changed since it was")
        writer.add(drawn("one", 1), small_delta("one", 1), sketch_update({"w": torch.ones(5)}, 0))


def test_verify_does_not_wait_for_a_pipe(bank: DeltaBank) -> None:
    path = bank.path("one")
    path.unlink()
    os.mkfifo(path)
    [problem] = verify(bank)
    assert problem == f"{path}: cannot be read (no regular file); restore it from a copy"
    refused(lambda: bank.delta("one"), "no such delta file")


def test_verify_sees_a_task_of_another_base(bank: DeltaBank) -> None:
    value = json.loads(bank.files.index.read_text())
    value["base"] = "bbbb"
    write(bank.files.index, value)
    [problem] = verify(DeltaBank(bank.folder))
    assert "made for model aaaa" in problem


def write(path: Path, value: dict[str, Any]) -> None:
    """An index with a right checksum."""
    rest = {key: part for key, part in value.items() if key != "checksum"}
    path.write_text(json.dumps({**rest, "checksum": json_checksum(rest)}))


def deep(depth: int = 100_000) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "not the index of a bank"),
        ("null", "not the index of a bank"),
        ('{"format": 3}', "not the index of a bank"),
        (deep(), "not valid JSON"),
        ('{"a": ' + deep(900) + ', "format": "trace_dist.bank", "version": 2}', "wrong checksum"),
        ('{"n": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"format": "trace_dist.bank"}', "version None, but this release reads 1 to 3"),
        ('{"format": "trace_dist.bank", "version": [1]}', "reads 1 to 3"),
        ('{"format": "trace_dist.bank", "version": 4}', "update trace_dist"),
        ('{"format": "trace_dist.bank", "version": 1}', "base is missing or not str"),
        ('{"format": "trace_dist.bank", "version": 1, "base": "a", "layer": "1"}', "layer is missing"),
        ('{"format": "trace_dist.bank", "version": 2}', "wrong checksum"),
    ],
)
def test_an_index_that_is_none(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "bank.json").write_text(text)
    refused(lambda: DeltaBank(tmp_path), words)


def change(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda value: value.update(fields)


def change_task(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda value: value["tasks"][1].update(fields)


MEMBER = {"bytes": 1, "sha256": "0"}
FILES = {"delta.safetensors": MEMBER, "signature.safetensors": MEMBER}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        *((change(generation=value), "generation") for value in (None, "3", 2.0, True)),
        *((change(tasks=value), "tasks is missing") for value in (None, {}, "one")),
        *((change(tasks=[value]), "name is missing") for value in (None, 3, {}, [], "one")),
        *((change_task(name=value), "name") for value in (None, 3, "", "../../x", "a/b", "Base", "a\nb")),
        (change_task(name="base"), "a name occurs twice|has the files"),
        (lambda value: value["tasks"].append(value["tasks"][1]), "occurs twice"),
        *(
            (change_task(folder=value), "folder")
            for value in (None, "", "..", "../x", "/x", ".x", "a/b", "A")
        ),
        (change_task(folder="base"), "a folder occurs twice"),
        *((change_task(files=value), "files") for value in (None, [], {}, {"../x": MEMBER})),
        (change_task(files={**FILES, "../../x": MEMBER}), "has the files"),
        (change_task(files={"delta.safetensors": MEMBER}), "has the files"),
        (change_task(files={**FILES, "sketch.safetensors": {}}), "bytes is missing"),
        (change_task(files={**FILES, "sketch.safetensors": 3}), "bytes is missing"),
        (change_task(facts=None), "facts"),
        (change(base=None), "base"),
        (change(layer=1.5), "layer"),
    ],
)
def test_an_index_of_the_wrong_shape(
    damage: Callable[[dict[str, Any]], None], words: str, bank: DeltaBank
) -> None:
    value = json.loads(bank.files.index.read_text())
    damage(value)
    write(bank.files.index, value)
    refused(lambda: DeltaBank(bank.folder), words)


@pytest.mark.parametrize(
    "name", ["../../../outside", "/outside", "a/../../outside", "", 3, None, ["x"], "Base"]
)
def test_names_of_an_old_bank_cannot_leave_its_folder(name: Any, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b" / "bank"
    write_old_bank(folder, [(drawn("one", 1), small_delta("one", 1))])
    small_delta("outside", 2).save(tmp_path / "outside.safetensors")
    path = folder / "signatures.safetensors"
    header = {"format": "trace_dist.signatures", "version": 1, "tasks": [name]}
    save_file(load_file(path), str(path), {"header": json.dumps(header)})
    refused(lambda: DeltaBank(folder), "rename the task")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("{", "corrupt"),
        (deep(), "corrupt"),
        ("[]", "this is not a"),
        ("3", "this is not a"),
        ({}, "version None"),
        ({"version": 1}, "without valid layouts"),
        ({"version": 1, "layouts": {}, "granularity": "element", "meta": {}}, "corrupt"),
        ({"version": 1, "layouts": {"w": [[20, 50], 1]}, "granularity": "element", "meta": 3}, "corrupt"),
        ({"version": 1, "layouts": {"w": [[20, 50], 1]}, "meta": {}}, "corrupt"),
        (
            {"version": 1, "layouts": {"w": ["x", "y"]}, "granularity": "element", "meta": {}},
            "layouts|corrupt",
        ),
        ({"version": 1, "layouts": 3}, "layouts"),
        ({"version": 7}, "version 7"),
    ],
)
@pytest.mark.parametrize("kind", ["delta", "signature", "sketch"])
def test_headers_that_lie(header: Any, words: str, kind: str, bank: DeltaBank, tmp_path: Path) -> None:
    """Written with right checksums, so that only their sense is wrong."""
    path = bank.files.task("one") / f"{kind}.safetensors"
    tensors = load_file(path)
    if isinstance(header, dict):
        header = {**header, "format": f"trace_dist.{kind}", "checksum": tensors_checksum(tensors)}
        header = json.dumps({**header, "header_checksum": json_checksum(header)})
    save_file(tensors, str(path), {"header": header})
    load: dict[str, Callable[[Path], object]] = {
        "delta": Delta.load,
        "signature": Signature.load,
        "sketch": Sketch.load,
    }
    refused(lambda: load[kind](path))
    if kind == "delta":
        refused(lambda: load[kind](path), words)
        refused(lambda: Delta.load_mask(path), words)


def test_an_old_delta_has_its_own_checksum(tmp_path: Path) -> None:
    write_old_bank(tmp_path, [(drawn("one", 1), small_delta("one", 1))])
    bank = DeltaBank(tmp_path)
    path = tmp_path / "deltas" / "one.safetensors"
    assert same_delta(bank.delta("one"), small_delta("one", 1))
    content = path.read_bytes()
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 4]) + content[-2:])
    refused(lambda: bank.delta("one"), "wrong checksum")
    refused(lambda: bank.mask("one"), "wrong checksum")
    assert len(verify(bank)) == 1
    refused(lambda: bank.rename("one", "two"), "wrong checksum")
    assert Index.load(bank.files.index).version == 1
    bank.remove("one")
    assert DeltaBank(tmp_path).tasks == []
