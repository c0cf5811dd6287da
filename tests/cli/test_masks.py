"""``trace-dist mask``: what it says of a mask file, and what it makes of several, against boolean algebra."""

from __future__ import annotations

import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch
from PIL import Image

from trace_dist.cli.main import main
from trace_dist.masks import Mask, UnitLayout

LAYOUTS = {
    "model.layers.0.self_attn.q_proj.weight": UnitLayout((5, 7), 3),
    "model.layers.0.mlp.up_proj.weight": UnitLayout((9, 7), 3),
    "model.layers.1.self_attn.q_proj.weight": UnitLayout((5, 7), 3),
    "model.norm.weight": UnitLayout((7,), 1),
}
Q, UP, LATE, NORM = LAYOUTS


def mask(units: dict[str, list[int]], **meta: str) -> Mask:
    chosen = {name: torch.tensor(each, dtype=torch.int32) for name, each in units.items()}
    return Mask(chosen, LAYOUTS, "block", {"model": "one", "task": "t", **meta})


MASKS = {
    "first": mask({Q: [0, 2, 4], UP: [1]}),
    "second": mask({Q: [2, 3], UP: [1, 5], NORM: [6]}),
    "third": mask({Q: [2], LATE: [0]}),
    "apart": mask({LATE: [7]}),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name, each in MASKS.items():
        each.save(tmp_path / f"{name}.safetensors")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["mask", *words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["mask", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    return error


def rows(text: str) -> dict[str, list[str]]:
    """First cell -> the others, of all rows of the tables in a text."""
    cells = [
        [cell.strip() for cell in line.strip("│┃").split("│")] for line in text.splitlines() if "│" in line
    ]
    return {first: others for first, *others in cells}


FILES = [f"{name}.safetensors" for name in ("first", "second", "third")]


@pytest.mark.parametrize(
    ("action", "operation"),
    [
        ("union", lambda a, b, c: a | b | c),
        ("intersect", lambda a, b, c: a & b & c),
        ("subtract", lambda a, b, c: a & ~b & ~c),
    ],
)
def test_masks_are_combined_as_sets(action: str, operation, folder: Path, capsys) -> None:
    text = run(capsys, action, *FILES, "--out", "out/made.safetensors")
    made = Mask.load(folder / "out" / "made.safetensors")
    for name in LAYOUTS:
        parts = [MASKS[each].dense(name) for each in ("first", "second", "third")]
        assert torch.equal(made.dense(name), operation(*parts)), name
    assert f"{made.num_entries} entries" in text
    assert made.meta["model"] == "one"
    assert made.meta["of"] == ["first", "second", "third"]


def test_what_is_empty_is_not_written(folder: Path, capsys) -> None:
    for words in (["intersect", "first.safetensors", "apart.safetensors"],
                  ["subtract", "third.safetensors", "second.safetensors", "third.safetensors"]):  # fmt: skip
        error = refused(capsys, *words, "--out", "nothing.safetensors")
        assert "selects nothing" in error
        assert words[1] in error
        assert words[-1] in error
        assert not (folder / "nothing.safetensors").exists()


@pytest.mark.parametrize("action", ["union", "intersect", "subtract", "overlap", "diff"])
def test_masks_that_do_not_belong_together_are_named(action: str, folder: Path, capsys) -> None:
    mask({Q: [0]}, model="two").save(folder / "foreign.safetensors")
    fine = {name: UnitLayout(layout.shape, 1) for name, layout in LAYOUTS.items()}
    entry = {Q: torch.tensor([0], dtype=torch.int32)}
    Mask(entry, fine, "element", {"model": "one"}).save(folder / "fine.safetensors")
    Mask(entry, {Q: UnitLayout((5, 7), 2)}, "block", {"model": "one"}).save(folder / "other.safetensors")
    out = [] if action in ("overlap", "diff") else ["--out", "made.safetensors"]
    for file, words in (
        ("foreign", ["models one and two"]),
        ("fine", ["block and element"]),
        ("other", [f"{Q}: [5, 7] in units of 3 and [5, 7] in units of 2"]),
    ):
        error = refused(capsys, action, "first.safetensors", f"{file}.safetensors", *out)
        for word in ("first.safetensors", f"{file}.safetensors", *words):
            assert word in error
    assert not (folder / "made.safetensors").exists()


def test_one_mask_is_not_combined_and_no_input_is_overwritten(folder: Path, capsys) -> None:
    assert "name two files" in refused(capsys, "union", "first.safetensors", "--out", "made.safetensors")
    error = refused(capsys, "union", *FILES, "--out", "./second.safetensors")
    assert "is one of the masks" in error
    assert Mask.load(folder / "second.safetensors") == MASKS["second"]


@pytest.mark.parametrize("place", ["a folder.png", "/proc/nowhere/made.png"])
def test_a_place_that_takes_no_file_is_named_before_the_work(place: str, folder: Path, capsys) -> None:
    (folder / "a folder.png").mkdir()
    for field, words in (("out", ("union", *FILES[:2])), ("picture", ("show", "missing"))):
        assert refused(capsys, *words, f"--{field}", place).startswith(f"error: {field}={place!r}: ")
    assert refused(capsys, "union", *FILES[:2], "--out", ".").startswith("error: out='.': is a folder")


def test_diff(folder: Path, capsys) -> None:
    """Units of 3 in rows of 7: the third of each row has one element."""
    text = run(capsys, "diff", "first.safetensors", "second.safetensors")
    found = rows(text)
    assert found[Q] == ["6", "3", "1"]
    assert found[UP] == ["0", "1", "3"]
    assert found[NORM] == ["0", "1", "0"]
    assert LATE not in found
    assert "6 entries in only the first, 5 entries in only the second, 4 entries in both" in text
    same = run(capsys, "diff", "first.safetensors", "first.safetensors")
    assert "they select the same" in same


def test_overlap(folder: Path, capsys) -> None:
    text = run(capsys, "overlap", *FILES)
    dense = {
        n: torch.cat([MASKS[n].dense(p).flatten() for p in LAYOUTS]) for n in ("first", "second", "third")
    }
    for name, cells in rows(text).items():
        if name in dense:
            shares = [
                100 * float((dense[name] & other).sum() / dense[name].sum()) for other in dense.values()
            ]
            assert cells == [f"{share:.2f}" for share in shares]
    both = float((dense["first"] & dense["third"]).sum() / (dense["first"] | dense["third"]).sum())
    assert f"first and third: {both:.5f}" in text


def test_stats(folder: Path, capsys) -> None:
    text = run(capsys, "stats", "second.safetensors")
    found = rows(text)
    # tensors, units, entries, density, share of the mask's 9 entries
    assert found["q"] == ["1/2", "2", "4", f"{4 / 70:.5f}", f"{400 / 9:.2f}"]
    assert found["up"] == ["1/1", "2", "4", f"{4 / 63:.5f}", f"{400 / 9:.2f}"]
    assert found["norm"] == ["1/1", "1", "1", f"{1 / 7:.5f}", f"{100 / 9:.2f}"]
    assert found["0"][2] == "8"
    assert found["1"][:3] == ["0/1", "0", "0"]
    assert found["outside"][2] == "1"
    assert found[UP] == found["up"]
    assert found[LATE] == ["0/1", "0", "0", "0.00000", "0.00"]


def test_stats_of_a_mask_that_names_a_tensor_without_elements(folder: Path, capsys) -> None:
    """Ours leave such a tensor out."""
    empty, made = {"model.layers.9.mlp.up_proj.weight": UnitLayout((0, 5), 1)}, MASKS["first"]
    Mask(made.units, {**LAYOUTS, **empty}, "block").save("empty.safetensors")
    assert rows(run(capsys, "stats", "empty.safetensors"))["9"] == ["0/1", "0", "0", "0.00000", "0.00"]


def test_pictures(folder: Path, capsys) -> None:
    run(capsys, "show", "first.safetensors", "--picture", "first.png")
    run(capsys, "show", "first.safetensors", "--picture", "first.svg")
    with Image.open(folder / "first.png") as picture:
        assert picture.width > 400
        assert len(set(picture.convert("RGB").getdata())) > 10
    root = xml.etree.ElementTree.parse(folder / "first.svg").getroot()
    assert root.tag.endswith("svg")
    assert "must end in .png or .svg" in refused(
        capsys, "show", "first.safetensors", "--picture", "first.gif"
    )
    Mask({NORM: torch.tensor([0], dtype=torch.int32)}, {NORM: LAYOUTS[NORM]}, "block").save(
        folder / "norm.safetensors"
    )
    assert "nothing to draw" in refused(capsys, "show", "norm.safetensors", "--picture", "norm.png")
    assert not (folder / "norm.png").exists()
    deep = Q.replace(".0.", ".4000000000.")
    Mask({deep: MASKS["first"].units[Q]}, {deep: LAYOUTS[Q]}, "block").save(folder / "deep.safetensors")
    error = refused(capsys, "show", "deep.safetensors", "--picture", "deep.png")
    assert "would be of layer 4000000000, and no model has more than 2000" in error


@pytest.mark.parametrize("action", ["show", "stats"])
def test_what_is_no_mask_is_one_line(action: str, folder: Path, capsys) -> None:
    (folder / "broken.safetensors").write_bytes(b"nothing")
    assert "broken.safetensors" in refused(capsys, action, "broken.safetensors")
    assert "absent.safetensors" in refused(capsys, action, "absent.safetensors")
