"""Mask and saliency files: what was written comes back, anything else is one clear line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from masks.earlier import earlier_digest
from safetensors import safe_open
from safetensors.torch import save_file

from trace_dist.masks import Mask, UnitLayout
from trace_dist.masks.header import layouts_header
from trace_dist.masks.storage import load_saliency, save_saliency


@pytest.fixture
def mask(layouts: dict[str, UnitLayout]) -> Mask:
    units = {"whole": torch.tensor([0, 11]), "ragged": torch.tensor([2, 3])}
    int32 = {name: indices.to(torch.int32) for name, indices in units.items()}
    return Mask(int32, layouts, "block", {"task": "t", "model": "f"})


@pytest.fixture
def path(mask: Mask, tmp_path: Path) -> Path:
    mask.save(tmp_path / "masks" / "t.safetensors")
    return tmp_path / "masks" / "t.safetensors"


def rewrite(path: Path, **changes: Any) -> None:
    """Change fields of the header; None removes one."""
    with safe_open(str(path), framework="pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        header = json.loads(handle.metadata()["header"]) | changes
    header = {key: value for key, value in header.items() if value is not None}
    save_file(tensors, str(path), metadata={"header": json.dumps(header)})


def refused(path: Path) -> str:
    with pytest.raises(ValueError, match=r"file|header|mask") as caught:
        Mask.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_round_trip(mask: Mask, path: Path) -> None:
    loaded = Mask.load(str(path))
    assert loaded == mask
    assert (loaded.granularity, loaded.meta, loaded.density) == (mask.granularity, mask.meta, mask.density)
    assert {name: units.dtype for name, units in loaded.units.items()} == dict.fromkeys(
        mask.units, torch.int32
    )
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_round_trip_of_wide_indices(tmp_path: Path) -> None:
    layouts = {"w": UnitLayout((70_000, 40_001), 1)}
    mask = Mask({"w": torch.tensor([5, 2**31 + 7, 70_000 * 40_001 - 1])}, layouts, "element")
    mask.save(tmp_path / "wide.safetensors")
    assert Mask.load(tmp_path / "wide.safetensors").units["w"].tolist() == mask.units["w"].tolist()


def test_a_missing_file(tmp_path: Path) -> None:
    assert "no such mask file; check the path" in refused(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 100, -5])
def test_a_truncated_file(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])
    assert "corrupt mask file" in refused(path)


def test_a_file_of_another_format(path: Path) -> None:
    path.write_text("not a mask at all, but long enough to be read as one")
    assert "corrupt mask file" in refused(path)


def test_a_flipped_bit_that_leaves_a_valid_selection(path: Path) -> None:
    """The last index of the last tensor: 11 becomes 10, which no other check could notice."""
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    assert "do not match their digest" in refused(path)


def test_a_file_of_an_earlier_release(mask: Mask, path: Path) -> None:
    """Its digest is of the indices."""
    rewrite(path, digest=earlier_digest(mask), header_checksum=None)
    assert Mask.load(path) == mask
    test_a_flipped_bit_that_leaves_a_valid_selection(path)


def test_indices_out_of_range(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 64
    path.write_bytes(content)
    assert "lies outside its 12 units" in refused(path)


def test_another_kind_of_file(path: Path, layouts: dict[str, UnitLayout]) -> None:
    save_saliency(path, {"vector": torch.rand(7)}, layouts, {})
    assert "format is 'trace_dist.saliency', not 'trace_dist.mask'" in refused(path)
    save_file({"w": torch.zeros(2)}, str(path))
    assert "format is None, not 'trace_dist.mask'" in refused(path)
    save_file({"w": torch.zeros(2)}, str(path), metadata={"header": "[1]"})
    assert "format is None, not 'trace_dist.mask'" in refused(path)
    save_file({"w": torch.zeros(2)}, str(path), metadata={"header": "{"})
    assert "corrupt mask file" in refused(path)


def test_a_newer_version(path: Path) -> None:
    rewrite(path, version=2)
    assert "version 2, but this release reads 1; update trace_dist" in refused(path)


def test_columns_round_trip_beside_what_old_files_hold(tmp_path: Path) -> None:
    """Only columns write a third number: a file without them is what it was before there were columns."""
    layouts = {"columns": UnitLayout((2, 6, 8), 6, 8), "vector": UnitLayout((7,), 1)}
    mask = Mask({"columns": torch.tensor([3, 15], dtype=torch.int32)}, layouts, "column")
    mask.save(tmp_path / "m.safetensors")
    assert Mask.load(tmp_path / "m.safetensors") == mask
    assert layouts_header(layouts) == {"columns": [[2, 6, 8], 6, 8], "vector": [[7], 1]}


@pytest.mark.parametrize(
    "bad",
    [None, [], {"whole": 3}, {"whole": [[6, 8], 5]}, {"whole": [[6, 8], 49]}, {"whole": [[6, 8], 8, 6]},
     {"whole": [[6, 8], 6, 8, 1]}],
)  # fmt: skip
def test_layouts_that_make_no_sense(path: Path, bad: Any) -> None:
    rewrite(path, layouts=bad)
    assert "header without valid layouts" in refused(path) or "'ragged' has units but no layout" in refused(
        path
    )


@pytest.mark.parametrize("name", ["granularity", "meta", "digest"])
def test_a_header_without_a_field(path: Path, name: str) -> None:
    rewrite(path, **{name: None})
    assert f"header without '{name}'; make the file again" in refused(path)


def test_saliency_round_trip(tmp_path: Path, layouts: dict[str, UnitLayout]) -> None:
    scores = {name: torch.rand(layout.num_units) for name, layout in layouts.items()}
    save_saliency(tmp_path / "s.safetensors", scores, layouts, {"task": "t"})
    loaded, same_layouts, meta = load_saliency(tmp_path / "s.safetensors")
    assert {name: values.tolist() for name, values in loaded.items()} == {
        name: values.tolist() for name, values in scores.items()
    }
    assert same_layouts == layouts
    assert meta == {"task": "t"}


def test_a_mask_is_no_saliency_map(path: Path) -> None:
    with pytest.raises(ValueError, match=r"format is 'trace_dist\.mask', not 'trace_dist\.saliency'"):
        load_saliency(path)


def test_no_room_on_the_disk(mask: Mask, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("trace_dist.utils.files.shutil.disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"MiB are needed but .* are free; free some disk space"):
        mask.save(path)
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", ["mask", "saliency"])
def test_any_bit(kind: str, path: Path, layouts: dict[str, UnitLayout]) -> None:
    """A bit of the header counts too: of the model that it was made for, of the shapes."""
    read = Mask.load
    if kind == "saliency":
        save_saliency(
            path, {n: torch.rand(one.num_units) for n, one in layouts.items()}, layouts, {"model": "f"}
        )
        read = load_saliency  # type: ignore[assignment]
    content, whole = path.read_bytes(), read(path)
    survived = 0
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        found = outcome(lambda: read(path))
        # nothing notices a bit of the name of the header's own checksum, and nothing is lost by it
        assert isinstance(found, str) or kind == "saliency" or found == whole
        survived += not isinstance(found, str)
    assert survived < 12


def outcome(read: Callable[[], object]) -> object:
    """What is read, or the one line that refuses it."""
    try:
        return read()
    except ValueError as error:
        return str(error)


def test_files_of_earlier_releases_have_no_checksum(
    path: Path, mask: Mask, layouts: dict[str, UnitLayout]
) -> None:
    rewrite(path, header_checksum=None)
    assert Mask.load(path) == mask
    scores = {name: torch.rand(layout.num_units) for name, layout in layouts.items()}
    save_saliency(path, scores, layouts, {})
    rewrite(path, header_checksum=None, checksum=None)
    assert load_saliency(path)[1] == layouts
    rewrite(path, header_checksum=None, checksum="0")
    with pytest.raises(ValueError, match="wrong checksum"):
        load_saliency(path)


@pytest.mark.parametrize("shape", [[-6, 8], [6.0, 8], ["6", 8], [True, 8], [2**40, 2**40], 6, "68", None])
def test_sizes_that_are_none(path: Path, shape: Any) -> None:
    rewrite(path, layouts={"whole": [shape, 4], "ragged": [[3, 5], 2]})
    assert "header without valid layouts" in refused(path)
