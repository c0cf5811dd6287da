"""DeepSpeed's gathers begin after what was written into the shards ([Note: gather stream] in sharding/zero3.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engine import rank_streams
from launching import launch

WAIT, GATHER = "side 1 waits for current", "in side 1"
WRITERS = [write.__name__ for write in rank_streams.WRITERS]


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    out = tmp_path_factory.mktemp("streams")
    launch(Path(rank_streams.__file__), 1, out, launcher="python")
    return json.loads((out / "log.json").read_text())


def in_order(log: list[str]) -> bool:
    """Whether the gather stream waited between each write and the next gather."""
    written = False
    for event in log:
        if event == "written":
            written = True
        elif event == WAIT:
            written = False
        elif event == GATHER and written:
            return False
    return True


@pytest.mark.launcher
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("evaluates", [False, True])
def test_a_gather_waits_for_what_was_written(logs: dict[str, list[str]], write: str, evaluates: bool) -> None:
    log = logs[f"{write}-{evaluates}"]
    assert GATHER in log  # DeepSpeed gathers on the stream that was told to wait
    assert "written" in log
    assert in_order(log)


@pytest.mark.launcher
def test_what_was_loaded_is_waited_for(logs: dict[str, list[str]]) -> None:
    assert WAIT in logs["loaded"]


def test_the_check_sees_a_gather_that_does_not_wait() -> None:
    assert in_order(["written", WAIT, GATHER, "written", "written", WAIT, GATHER, GATHER])
    assert not in_order(["written", WAIT, GATHER, "written", GATHER, WAIT])
