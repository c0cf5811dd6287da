"""What a stage tells its run arrives whole and in order, and the same warning once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from trace_dist.utils import log
from trace_dist.utils.events import EVENTS, EventReader, tell
from trace_dist.utils.log import get_logger, outcome, progress, setup_logging


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EventReader:
    monkeypatch.setenv(EVENTS, str(tmp_path / "events"))
    return EventReader(tmp_path / "events")


@pytest.fixture
def logging_set_up() -> Iterator[None]:
    logger = logging.getLogger("trace_dist")
    kept = logger.handlers[:], logger.level, logger.propagate
    setup_logging()
    yield
    logger.handlers[:], logger.level, logger.propagate = kept


def test_each_record_is_read_once(reader: EventReader) -> None:
    assert reader.news() == []
    tell("outcome", text="größer\nzwei")
    assert reader.news() == [{"kind": "outcome", "text": "größer\nzwei"}]
    assert reader.news() == []
    tell("progress", text="a", done=1, total=None)
    tell("progress", text="a", done=2, total=None)
    assert [event["done"] for event in reader.news()] == [1, 2]


def test_a_line_that_is_being_written_waits(reader: EventReader) -> None:
    tell("outcome", text="a")
    with reader.path.open("ab") as file:
        file.write(b'{"kind": "outcome", ')
        file.flush()
        assert [event["text"] for event in reader.news()] == ["a"]
        file.write(b'"text": "b"}\n')
    assert [event["text"] for event in reader.news()] == ["b"]


def test_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(EVENTS, raising=False)
    tell("outcome", text="a")
    # A folder that is gone stops nobody's work.
    monkeypatch.setenv(EVENTS, str(tmp_path / "absent" / "events"))
    tell("outcome", text="a")
    assert list(tmp_path.iterdir()) == []


def test_progress_goes_to_the_run(reader: EventReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "SECONDS_BETWEEN_EVENTS", 0.0)
    assert list(progress("abc", "reading", total=3)) == ["a", "b", "c"]
    events = reader.news()
    assert [event["done"] for event in events] == [0, 1, 2]
    assert {(event["kind"], event["text"], event["total"]) for event in events} == {
        ("progress", "reading", 3)
    }


@pytest.mark.usefixtures("logging_set_up")
def test_without_a_terminal_progress_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(EVENTS, raising=False)
    setup_logging()
    assert len(list(progress(range(3), "reading", total=3))) == 3
    assert "reading" not in capsys.readouterr().err
    monkeypatch.setattr(log, "SECONDS_BETWEEN_LINES", 0.0)
    list(progress(range(3), "reading", total=3))
    assert "reading: 1 of 3" in capsys.readouterr().err


@pytest.mark.usefixtures("logging_set_up")
def test_the_same_warning_comes_once(reader: EventReader, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    for _ in range(8):
        get_logger("trace_dist.a").warning("cut %d of %d prompts", 3, 60)
        get_logger("trace_dist.b").warning("cut 3 of 60 prompts")
        get_logger("trace_dist.b").info("read")
    get_logger("trace_dist.a").warning("cut %d of %d prompts", 4, 60)
    outcome("done")
    said = capsys.readouterr().err
    assert said.count("cut 3 of 60 prompts") == 1
    assert said.count("cut 4 of 60 prompts") == 1
    assert said.count("read") == 8
    assert [event["text"] for event in reader.news()] == [
        "cut 3 of 60 prompts",
        "cut 4 of 60 prompts",
        "done",
    ]
