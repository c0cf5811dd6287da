"""Masks: what they refuse, and what they count."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from masks.earlier import earlier_digest

from trace_dist.masks import Mask, UnitLayout
from trace_dist.masks import mask as mask_module
from trace_dist.masks.gaps import encode_gaps

Layouts = dict[str, UnitLayout]


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def mask(layouts: Layouts) -> Mask:
    return Mask({"whole": int32(0, 11), "ragged": int32(2, 3)}, layouts, "block", {"task": "t"})


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ({}, "selects nothing.*raise mask.density"),
        ({"whole": int32()}, "selects nothing"),
        ({"whole": int32(0), "ragged": int32()}, "'ragged' is listed without units"),
        ({"other": int32(0)}, "'other' has units but no layout"),
        ({"whole": int32(2, 1)}, "'whole' are not sorted and unique"),
        ({"whole": int32(1, 1)}, "'whole' are not sorted and unique"),
        ({"whole": int32(-1, 1)}, "'whole' lies outside its 12 units"),
        ({"whole": int32(1, 12)}, "'whole' lies outside its 12 units"),
        ({"ragged": int32(15)}, "'ragged' lies outside its 15 units"),
        ({"whole": torch.tensor([0.0, 1.0])}, "'whole' are .* torch.float32, not a list of int32"),
        ({"whole": int32(0, 1).view(1, 2)}, r"'whole' are \[1, 2\]"),
    ],
)
def test_what_is_refused(units: dict[str, torch.Tensor], message: str, layouts: Layouts) -> None:
    with pytest.raises(ValueError, match=f"^mask: .*{message}"):
        Mask(units, layouts, "block")


def test_counts(mask: Mask) -> None:
    """The units 2 and 3 of the ragged tensor hold 2 and 4 elements."""
    assert mask.num_entries == 8 + 6
    assert mask.num_maskable == 48 + 50 + 7
    assert mask.density == 14 / 105
    assert [mask.tensor_density(name) for name in mask.layouts] == [8 / 48, 6 / 50, 0.0]
    assert list(mask) == ["whole", "ragged"]
    assert len(mask) == 2


def test_dense(mask: Mask) -> None:
    whole = torch.zeros(6, 8, dtype=torch.bool)
    whole[0, :4] = whole[5, 4:] = True
    ragged = torch.zeros(5, 10, dtype=torch.bool)
    ragged[0, 8:] = ragged[1, :4] = True
    assert torch.equal(mask.dense("whole"), whole)
    assert torch.equal(mask.dense("ragged"), ragged)
    assert not mask.dense("vector").any()
    assert mask.elements("ragged").tolist() == [8, 9, 10, 11, 12, 13]


def test_the_digest_is_of_the_encoded_indices_and_read_once(
    mask: Mask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files hold it: what it is of must not change."""
    expected = hashlib.sha256(mask.granularity.encode())
    for name in sorted(mask.units):
        layout, words = mask.layouts[name], encode_gaps(mask.units[name])
        expected.update(f"{name}{layout.shape}{layout.unit} {len(words)} {words.dtype}".encode())
        expected.update(words.numpy().tobytes())
    assert mask.digest() == f"gaps-{expected.hexdigest()}"
    monkeypatch.setattr(hashlib, "sha256", None)
    assert mask.digest() == f"gaps-{expected.hexdigest()}"


def test_digests_of_earlier_releases_are_known(mask: Mask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_module, "HASHED_UNITS", 2)
    earlier = earlier_digest(mask)
    assert mask.has_digest(earlier)
    assert not replace(mask, units={**mask.units, "whole": int32(0, 10)}).has_digest(earlier)
    for wrong in (mask.digest().removeprefix("gaps-"), f"gaps-{earlier}", "", None):
        assert not mask.has_digest(wrong)


def test_the_digest_sees_selection_and_layout_but_not_order_or_width(mask: Mask, layouts: Layouts) -> None:
    backwards = {name: mask.units[name].long() for name in reversed(list(mask.units))}
    assert replace(mask, units=backwards).digest() == mask.digest()
    assert mask.with_meta(task="other").digest() == mask.digest()
    moved = replace(mask, units={**mask.units, "whole": int32(0, 10)})
    renamed = Mask({"vector": int32(0)}, layouts, "block")
    other_shape = replace(mask, layouts={**layouts, "whole": UnitLayout((8, 6), 4)})
    other_unit = replace(mask, layouts={**layouts, "whole": UnitLayout((6, 8), 2)})
    square = {"whole": UnitLayout((8, 8), 8)}
    rows = Mask({"whole": int32(1)}, square, "row")
    columns = Mask({"whole": int32(1)}, {"whole": UnitLayout((8, 8), 8, 8)}, "row")
    assert torch.equal(rows.dense("whole"), columns.dense("whole").T)
    digests = {m.digest() for m in (mask, moved, renamed, other_shape, other_unit, rows, columns)}
    assert len(digests) == 7


def test_equality_is_by_selection(mask: Mask, layouts: Layouts) -> None:
    twin = Mask({name: units.clone() for name, units in mask.units.items()}, dict(layouts), "block")
    assert mask == twin
    assert mask != replace(mask, units={"whole": int32(0, 11)})
    assert mask != replace(mask, layouts={**layouts, "vector": UnitLayout((8,), 1)})
    assert mask != "mask"


def test_meta_is_added_to(mask: Mask) -> None:
    assert mask.with_meta(model="m").meta == {"task": "t", "model": "m"}
    assert mask.meta == {"task": "t"}
