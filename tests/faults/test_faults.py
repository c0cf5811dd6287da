"""The faults of the tests: what may be said, that they happen once, where they happen; and a few of them in this process."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any

import pytest
from faults.cases import CASES, OUTSIDE
from faults.entry import main
from faults.grammar import EXAMPLES, KINDS, TYPES, parse_faults
from faults.inject import Injector, damage
from faults.once import Happened

from trace_dist.sharding.comm import Comm
from trace_dist.train.learner import DenseLearner, MaskedLearner
from trace_dist.utils import activity, files
from trace_dist.utils.files import write_json

ROOT = Path(__file__).parents[2]
LINE = "kill@rank=1,step=7,phase=backward; enospc@write=3;corrupt@file=manifest; delay@all_to_all=5s; nan@rank=0, step=3;"


def test_what_may_be_said() -> None:
    assert [(fault.kind, fault.options) for fault in parse_faults(LINE)] == [
        ("kill", {"rank": 1, "step": 7, "phase": "backward"}),
        ("enospc", {"write": 3}),
        ("corrupt", {"file": "manifest"}),
        ("delay", {"all_to_all": 5.0}),
        ("nan", {"rank": 0, "step": 3}),
    ]
    assert parse_faults("clock@jump=-1d")[0].options == {"jump": -86400.0}
    assert parse_faults("stop@for=200ms; spike@step=2,by=1.5")[0].options == {"for": 0.2}
    assert parse_faults(" ; ") == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("explode@rank=1", r"'explode@rank=1': there is no kind 'explode'; use one of kill, term"),
        ("kill@rank=1,colour=red", "kill takes no 'colour'; use rank, step, phase"),
        ("kill@rank=one", "rank='one' is not understood; use 7"),
        ("kill@rank", "rank='' is not understood"),
        ("kill@phase=lunch", "phase='lunch' is not understood; use one of data, forward"),
        ("kill@step=1,step=2", "step is given twice"),
        ("sleep@step=1", "sleep needs for; add for="),
        ("delay@step=3", "delay needs one collective; add one of all_to_all"),
        ("delay@any=1s,sum=1s", "delay needs one collective"),
        ("delay@all_to_all=5", "all_to_all='5' is not understood; use 5s, 200ms"),
        ("corrupt", "corrupt needs file"),
    ],
)
def test_what_is_refused(text: str, problem: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(ValueError, match=rf"^TRACE_DIST_FAULTS: .*{problem}"):
        parse_faults(text)
    monkeypatch.setenv("TRACE_DIST_FAULTS", text)
    assert main() == 2
    assert re.fullmatch(rf"error: TRACE_DIST_FAULTS: .*{problem}.*\n", capsys.readouterr().err)


def test_every_key_has_a_type_and_every_kind_a_case_and_a_row() -> None:
    assert {key for kind in KINDS.values() for key in kind.keys} == TYPES.keys()
    assert set(TYPES.values()) == EXAMPLES.keys()
    tried = {fault.kind for case in CASES for fault in parse_faults(case.faults)}
    assert tried == KINDS.keys()
    assert OUTSIDE.keys() == {case.name for case in CASES if not case.faults}
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    for name, kind in KINDS.items():
        assert f"| `{name}` | {kind.what} | {', '.join(f'`{key}`' for key in kind.keys)} |" in page, name


def test_the_table_that_is_published_is_of_these_cases() -> None:
    """There are 25 or more, none that was tried failed, and the page has a row of each."""
    found = json.loads((ROOT / "docs" / "results" / "faults.json").read_text())["cases"]
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert list(found) == [case.name for case in CASES if case.name in found]
    assert len([name for name, each in found.items() if "skipped" not in each]) >= 25
    assert all(f"| {name} |" in page for name in found)
    assert [name for name, each in found.items() if each["failures"]] == []
    assert all(each.get("seconds", 0) <= 30 for each in found.values())


def test_each_happens_once(tmp_path: Path) -> None:
    fault, other = parse_faults("kill@step=1; kill@step=1")
    happened = Happened(tmp_path)
    assert [
        happened.first(0, fault, 1),
        happened.first(0, fault, 1),
        Happened(tmp_path).first(0, fault, 1),
    ] == [True, False, False]
    assert happened.first(1, other, 1)
    assert [note["fault"] for note in happened.notes()] == ["kill@step=1"] * 2


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """What faults take the place of is put back."""
    monkeypatch.setattr(files, "os", files.os)
    monkeypatch.setattr(activity, "note", activity.note)
    for kind in (MaskedLearner, DenseLearner, Comm):
        for name, value in list(vars(kind).items()):
            if callable(value) and not name.startswith("__"):
                monkeypatch.setattr(kind, name, value)
        for name in ("accumulate", "forward"):
            if kind is not Comm:
                monkeypatch.setattr(kind, name, getattr(kind, name))


def installed(text: str, folder: Path) -> Happened:
    notes = folder / "notes"
    notes.mkdir()
    Injector(parse_faults(text), Happened(notes), folder / "run").install()
    return Happened(notes)


@pytest.mark.usefixtures("restored")
def test_a_full_disk_at_the_second_write(tmp_path: Path) -> None:
    """The product's own message, the old file stays, and the write after it succeeds."""
    happened = installed("enospc@write=2", tmp_path)
    path = tmp_path / "run" / "some.json"
    write_json(path, 1)
    with pytest.raises(ValueError, match=r"some\.json: cannot be written \(No space left on device\)"):
        write_json(path, 2)
    assert path.read_text() == "1\n"
    write_json(path, 3)
    assert [path.name for path in path.parent.iterdir()] == ["some.json"]
    assert len(happened.notes()) == 1


@pytest.mark.usefixtures("restored")
def test_a_file_by_its_name_and_a_collective_by_its_step(tmp_path: Path) -> None:
    happened = installed("eio@file=other; lose@step=2,max=0s", tmp_path)
    write_json(tmp_path / "run" / "one.json", 1)
    with pytest.raises(ValueError, match="Input/output error") as caught:
        write_json(tmp_path / "run" / "other.json", 1)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EIO
    activity.note("t", 1, None)
    Comm().barrier()
    Comm().objects(1)
    activity.note("t", 2, None)
    with pytest.raises(ConnectionError):
        Comm().max(None)  # type: ignore[arg-type]
    Comm().max(None)  # type: ignore[arg-type]
    assert [note["step"] for note in happened.notes()] == [0, 2]


@pytest.mark.parametrize("kind", ["corrupt", "truncate", "empty", "remove"])
def test_damage(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    damage(path, kind)
    content = path.read_bytes() if path.exists() else None
    assert content == {"corrupt": b"0123416789", "truncate": b"01234", "empty": b"", "remove": None}[kind]
