"""A stage at work: where its output goes, and what is shown when it fails."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from trace_dist.config import ModelConfig, RunConfig, TaskConfig
from trace_dist.launching import ProcessFailed
from trace_dist.stages import pipeline, running
from trace_dist.stages.pipeline import run_pipeline
from trace_dist.stages.running import NUM_LINES, failure, last_words
from trace_dist.stages.stage import Stage
from trace_dist.utils.codes import LOST
from trace_dist.utils.events import EventReader

TRACEBACK = [
    "Traceback (most recent call last):",
    '  File "a.py", line 1, in <module>',
    "    f()",
    "KeyError: 'x'",
]
LAUNCHERS = [
    "Traceback (most recent call last):",
    '  File "run.py", line 9',
    "ChildFailedError: see its site",
]


@pytest.fixture
def own_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("own_signals")
def test_a_stage_that_fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its own error line is shown, and where its log is; a real process that is told a command that is none."""
    cfg = RunConfig(run_dir=str(tmp_path), target=ModelConfig("m"), tasks=[TaskConfig("t", "t.jsonl")])
    with pytest.raises(
        ProcessFailed, match=r"stage make it: failed with exit code 2; .*logs/make-it\.log"
    ) as failed:
        run_pipeline(cfg, [[Stage("make it", ["trian"], [tmp_path / "made"])]])
    said = capfd.readouterr().err.splitlines()
    errors = [line for line in said if line.startswith("error")]
    assert len(errors) == 1
    assert "invalid choice: 'trian'" in errors[0]
    log = tmp_path / "logs" / "make-it.log"
    assert str(log) in str(failed.value)
    assert errors[0] in log.read_text().splitlines()
    assert [path.name for path in log.parent.iterdir()] == ["make-it.log"]


@pytest.mark.usefixtures("own_signals")
def test_a_stage_that_ends_well_without_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under DeepSpeed's launcher, whose exit code is 0 where pdsh was killed."""
    monkeypatch.setattr(running, "launch_command", lambda _: [sys.executable, "-c", "print('so far')"])
    monkeypatch.setattr(running, "APPEARS_SECONDS", 0.1)
    cfg = RunConfig(run_dir=str(tmp_path), target=ModelConfig("m"), tasks=[TaskConfig("t", "t.jsonl")])
    outputs = [tmp_path / "made", tmp_path / "lacking"]
    outputs[0].touch()
    with pytest.raises(ProcessFailed, match=r"ended without an error, but .*lacking is not there") as failed:
        run_pipeline(cfg, [[Stage("make it", ["train"], outputs, launched=True)]])
    assert failed.value.code == LOST
    outputs[1].touch()
    run_pipeline(cfg, [[Stage("make it", ["train"], [], launched=True)]])


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        (["chatter", "error: a=1: wrong; mend it", "more"], ["error: a=1: wrong; mend it"]),
        (
            ["error: a", "error [rank 1]: a", "error [rank 1]: b: c", *LAUNCHERS],
            ["error: a", "error [rank 1]: b: c"],
        ),
        (["chatter", *TRACEBACK, *LAUNCHERS, "rank 1 exited"], TRACEBACK),
        ([f"[rank1]: {line}" for line in TRACEBACK] + LAUNCHERS, [f"[rank1]: {line}" for line in TRACEBACK]),
        ([str(number) for number in range(40)], [str(number) for number in range(40)][-NUM_LINES:]),
        (TRACEBACK[:2], TRACEBACK[:2]),
        ([], []),
    ],
    ids=["error", "ranks", "traceback", "rank-traceback", "killed", "cut", "silent"],
)
def test_why_a_stage_failed(printed: list[str], shown: list[str]) -> None:
    assert last_words("\n".join(printed)) == shown


def test_a_run_that_is_told_to_end_twice_ends_once() -> None:
    """The second SIGTERM broke into what stops the stages, with a traceback."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match="143"):
            pipeline._on_terminate(signal.SIGTERM, None)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("printed", "cut"), [(b"step 1\nstep", True), (b"", True), (b"error: x\n", False)])
def test_a_log_that_a_full_disk_has_cut(
    printed: bytes, cut: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No error is above then, so none is promised; what is free is said."""
    (tmp_path / "s.log").write_bytes(printed)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    events = EventReader(tmp_path / "s.events")
    process = cast("subprocess.Popen[bytes]", None)
    stage = Stage("make it", [], [])
    said = str(failure(running.Running(stage, process, tmp_path / "s.log", 0, events, 0.0), 2))
    assert ("its error is above" in said) != cut
    assert (f"{tmp_path / 's.log'} ends before its error (0.0 MiB are free there)" in said) == cut
