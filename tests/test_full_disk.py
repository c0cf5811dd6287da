"""A disk that takes no more: whatever is written, the old file stays, the error is one line, and nothing else is left."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from bank.samples import base_model, drawn, make_delta, small_delta
from full_disk import FITS, full_disk
from launching import python
from report.samples import make_results

from trace_dist import DeltaBank, Mask
from trace_dist.cli.errors import explain_system
from trace_dist.masks import UnitLayout
from trace_dist.report import render_png, write_report
from trace_dist.report.markdown import main as insert_table
from trace_dist.run_folder import RunFolder
from trace_dist.train.metric_log import MetricLog
from trace_dist.utils.codes import FAILED
from trace_dist.utils.files import append_jsonl, filled_folder, write_json

RESULTS = make_results(["a", "b"])


def write_mask(path: Path) -> None:
    layouts = {"w": UnitLayout((100, 100), 1)}
    Mask({"w": torch.arange(5000, dtype=torch.int32)}, layouts, "element").save(path)


def write_table(path: Path) -> None:
    insert_table(str(path.parent / "given" / "results.json"), str(path), "t")


WRITERS: dict[str, Callable[[Path], object]] = {
    "report.html": lambda path: write_report(RESULTS, path),
    "picture.png": lambda path: render_png(RESULTS, path),
    "results.json": lambda path: write_json(path, RESULTS),
    "mask.safetensors": write_mask,
    "delta.safetensors": lambda path: make_delta(base_model()).save(path),
    "document.md": write_table,
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_old_file_stays(name: str, tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    write_json(tmp_path / "given" / "results.json", RESULTS)
    path = tmp_path / name
    old = b"<!-- t -->" + b"." * FITS + b"<!-- /t -->"
    path.write_bytes(old)
    with full_disk(), pytest.raises(ValueError, match="cannot be written") as caught:
        WRITERS[name](path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == old
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(["given", name])


def test_a_bank_is_as_before(tmp_path: Path) -> None:
    bank = DeltaBank.create(tmp_path / "bank", "aaaa", layer=1)
    bank.add(drawn("one", 1), small_delta("one", 1))
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with full_disk(500), pytest.raises(ValueError, match="cannot be written"):
        bank.add(drawn("two", 2), small_delta("two", 2))
    assert DeltaBank(tmp_path / "bank").tasks == ["one"]
    assert all(path.read_bytes() == content for path, content in files.items())


def test_lines_and_curves_that_cannot_be_added(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with full_disk(10), pytest.raises(ValueError, match=r"m\.jsonl: cannot be written"):
        append_jsonl(path, {"some": "more than ten bytes"})
    log = MetricLog(RunFolder(tmp_path), "t")
    with full_disk(10), pytest.raises(ValueError, match=r"metrics\.jsonl: cannot be written"):
        log.write(1, {"loss": 0.5})


def fill(path: Path, **content: Any) -> None:
    for name, text in content.items():
        (path / f"{name}.txt").write_text(text)


def test_a_folder_is_filled_when_all_is_written(tmp_path: Path) -> None:
    """An export goes into a new folder, or into one that holds something."""
    path = tmp_path / "out"
    with full_disk(10), pytest.raises(ValueError, match="out: cannot be written"):
        with filled_folder(path) as folder:
            fill(folder, weights="w" * 100)
    assert list(tmp_path.iterdir()) == []
    with filled_folder(path) as folder:
        fill(folder, weights="old", notes="mine")
    with full_disk(10), pytest.raises(ValueError, match="out: cannot be written"):
        with filled_folder(path) as folder:
            fill(folder, tokens="small", weights="w" * 100)
    assert {each.name: each.read_text() for each in path.iterdir()} == {
        "weights.txt": "old",
        "notes.txt": "mine",
    }
    with filled_folder(path) as folder:
        fill(folder, weights="new")
    assert {each.name: each.read_text() for each in path.iterdir()} == {
        "weights.txt": "new",
        "notes.txt": "mine",
    }
    assert list(tmp_path.iterdir()) == [path]


def test_what_the_system_refuses_is_one_line() -> None:
    message = explain_system(OSError(28, "No space left on device", "/x/y"))
    assert message.startswith("/x/y: No space left on device; check paths, permissions and free space")
    assert json.dumps(message).count("\\n") == 0


def test_an_error_that_nothing_takes_keeps_its_exit_code() -> None:
    """The log of a stage is on the disk that is full; its exit code still says whose error it is."""
    with open("/dev/full", "w") as full:
        done = subprocess.run([python(), "-m", "trace_dist", "nonsense"], stderr=full, timeout=300)
    assert done.returncode == FAILED


def test_a_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    with chdir(gone):
        gone.rmdir()
        with pytest.raises(FileNotFoundError) as caught:
            Path("config.yaml").absolute()
        said = explain_system(caught.value)
    assert said.startswith(
        "the folder that this command was started in is gone; change into one that is there"
    )
