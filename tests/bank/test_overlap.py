"""Overlap of masks, beside dense masks."""

from __future__ import annotations

from pathlib import Path

import torch
from bank.samples import drawn, small_delta

from trace_dist import Delta, DeltaBank, Mask
from trace_dist.bank.bank import BASE
from trace_dist.bank.overlap import overlap, shared_entries
from trace_dist.masks import UnitLayout


def mask(granularity: str, unit: int, seed: int, names: tuple[str, ...]) -> Mask:
    generator = torch.Generator().manual_seed(seed)
    layouts = {name: UnitLayout((7, 30), unit) for name in "abc"}
    units = {
        name: torch.randperm(layouts[name].num_units, generator=generator)[: layouts[name].num_units // 3]
        for name in names
    }
    sorted_units = {name: chosen.sort().values.to(torch.int32) for name, chosen in units.items()}
    return Mask(sorted_units, layouts, granularity)


def test_shared_entries_of_all_granularities() -> None:
    masks = [
        mask("element", 1, 0, ("a", "b")),
        mask("element", 1, 1, ("b", "c")),
        mask("row", 30, 2, ("a", "b", "c")),
        # the last unit of each row is shorter
        mask("block", 8, 3, ("a", "b", "c")),
        mask("block", 8, 4, ("a", "c")),
    ]
    for some in (masks, masks[:2], masks[3:]):
        dense = torch.stack([torch.cat([mask.dense(name).flatten() for name in "abc"]) for mask in some])
        assert torch.equal(shared_entries(some), dense.double() @ dense.double().T)


def test_matrix(tmp_path: Path) -> None:
    bank = DeltaBank.create(tmp_path, "aaaa", layer=1)
    bank.add(drawn(BASE, 0), None)
    deltas = [small_delta("one", 1), small_delta("two", 2)]
    few = Mask({"w": deltas[0].mask.units["w"][:10]}, deltas[0].mask.layouts, "element")
    deltas.append(Delta(few, {"w": torch.ones(10)}, "few"))
    for seed, delta in enumerate(deltas, start=1):
        bank.add(drawn(delta.task, seed), delta)
    names, matrix = overlap(bank)
    assert names == ["one", "two", "few"]
    dense = torch.stack([delta.mask.dense("w").flatten().double() for delta in deltas])
    shared = dense @ dense.T
    torch.testing.assert_close(matrix, shared / shared.diagonal()[:, None])
    assert matrix[2, 0] == 1
    assert matrix[0, 2] == 0.1


def test_an_empty_bank(tmp_path: Path) -> None:
    names, matrix = overlap(DeltaBank.create(tmp_path, "aaaa", layer=1))
    assert names == []
    assert matrix.shape == (0, 0)
