"""A rank that is lost is named, with its host and what it was in, and all others end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from trace_dist.utils import activity
from trace_dist.utils.codes import FAILED, LOST

SCRIPT = Path(__file__).with_name("beating.py")
WORK = "it was in train: retrieved: copy step 7 of 40 (beating.py:"
Ranks = Callable[..., list[subprocess.Popen[str]]]


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    """Starts a rank for each behaviour; what is left of them ends with the test."""
    begun: list[subprocess.Popen[str]] = []

    def start(*behaviours: str, silence: float = 4.0, stuck: float = 10.0) -> list[subprocess.Popen[str]]:
        place = tmp_path / "place"
        for rank, behaviour in enumerate(behaviours):
            words = [sys.executable, SCRIPT, rank, place, silence, stuck, behaviour]
            begun.append(
                subprocess.Popen(
                    list(map(str, words)), stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
                )
            )
        deadline = time.monotonic() + 20
        while len(list(tmp_path.glob("pid-*"))) < len(begun) and time.monotonic() < deadline:
            time.sleep(0.02)
        return begun

    yield start
    for process in begun:
        with suppress(ProcessLookupError):
            process.kill()
        process.communicate()


def ends(process: subprocess.Popen[str], seconds: float = 20) -> tuple[int, str]:
    """Exit code, and the errors that were printed; a slow machine may have a rank warn of others before."""
    said = process.communicate(timeout=seconds)[1]
    errors = [line for line in said.splitlines(keepends=True) if line.startswith("error")]
    return process.returncode, "".join(errors)


def test_a_killed_rank_is_named_by_rank_0_alone(ranks: Ranks) -> None:
    first, _, third = ranks("work", "kill", "work")
    code, said = ends(first)
    assert code == LOST
    assert said.startswith(f"error: lost contact: rank 1 on node-2 has ended without a word; {WORK}")
    assert said.count("\n") == 1
    assert ends(third) == (LOST, "")


def test_rank_0_killed_is_named_by_all_others(ranks: Ranks) -> None:
    _, second, third = ranks("kill", "work", "work")
    for rank, process in ((1, second), (2, third)):
        code, said = ends(process)
        assert code == LOST
        assert said.startswith(
            f"error [rank {rank}]: lost contact: rank 0 on node-1 has ended without a word"
        )


def test_a_stopped_rank_is_named(ranks: Ranks) -> None:
    first, second, third = ranks("work", "work", "work", silence=3)
    time.sleep(2.5)
    os.kill(second.pid, signal.SIGSTOP)
    code, said = ends(first)
    assert code == LOST
    assert f"rank 1 on node-2 has given no sign of life for 3 s (launch.silence_seconds); {WORK}" in said
    assert ends(third) == (LOST, "")


def test_a_job_that_is_stopped_as_a_whole_goes_on(ranks: Ranks) -> None:
    begun = ranks("work", "work", "work", silence=1)
    time.sleep(0.5)
    for number, pause in ((signal.SIGSTOP, 3.0), (signal.SIGCONT, 2.5)):
        for process in begun:
            os.kill(process.pid, number)
        time.sleep(pause)
    assert [process.poll() for process in begun] == [None] * 3


def test_ranks_that_all_wait_are_stuck(ranks: Ranks) -> None:
    first, second, third = ranks("wait", "wait", "wait", stuck=0.03)
    code, said = ends(first)
    assert code == LOST
    assert (
        "lost contact: every rank has waited for the others for 0.03 min (launch.stuck_minutes): rank 0 on node-1 in "
        in said
    )
    assert "rank 2 on node-3 in train: retrieved: copy step 7 of 40, barrier (beating.py:" in said
    assert [ends(process) for process in (second, third)] == [(LOST, "")] * 2


def test_one_that_works_is_waited_for(ranks: Ranks) -> None:
    begun = ranks("wait", "threads", "wait", stuck=0.02)
    time.sleep(3)
    assert [process.poll() for process in begun] == [None] * 3


def test_a_rank_that_is_done_is_not_lost(ranks: Ranks) -> None:
    first, second, third = ranks("work", "leave", "leave")
    assert [ends(process)[0] for process in (second, third)] == [0, 0]
    time.sleep(1.5)
    assert first.poll() is None


def test_a_rank_that_fails_speaks_for_itself(ranks: Ranks) -> None:
    """The others end a little later, and say nothing of their own."""
    first, second, third = ranks("work", "fail", "work")
    assert ends(second) == (FAILED, "")
    assert ends(first, 30) == ends(third, 30) == (FAILED, "")


def test_what_a_process_is_in() -> None:
    activity.begin("eval")
    activity.note("copy", 3, None)
    seen = activity.Watcher().look()
    assert seen.work == "eval: copy step 3"
    assert seen.collective is None
    assert activity.Activity.from_json({"work": "w", "place": "p:1", "collective": "barrier"}).still == 0
    assert str(activity.Activity("w", "p:1", "barrier")) == "w, barrier (p:1)"
