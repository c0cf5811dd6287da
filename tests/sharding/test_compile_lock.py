"""A compilation that was killed does not hang every later job; one that is under way is waited for."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from trace_dist.sharding.compile_lock import STALE_SECONDS, say_first_use, wait_for_compilations


@pytest.fixture(params=["op", "py311_cpu/op"])
def lock(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / request.param / "lock"
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def age(lock: Path) -> None:
    then = time.time() - STALE_SECONDS - 1
    for path in lock.parent.iterdir():
        os.utime(path, (then, then))


def test_a_lock_that_is_left_over_goes(lock: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (lock.parent / "shm.o").touch()
    age(lock)
    wait_for_compilations(tmp_path, poll_seconds=0.01)
    assert not lock.exists()
    assert f"{lock}: left by a compilation that was killed" in caplog.text


@pytest.mark.parametrize("changed", ["lock", "shm.o"])
def test_a_compilation_is_waited_for(
    lock: Path, changed: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its lock or what it writes is new."""
    (lock.parent / "shm.o").touch()
    age(lock)
    os.utime(lock.parent / changed)
    threading.Timer(0.3, lock.unlink).start()
    begin = time.monotonic()
    with caplog.at_level("INFO"):
        wait_for_compilations(tmp_path, poll_seconds=0.01)
    assert time.monotonic() - begin > 0.25
    assert caplog.text.count("is being compiled by another process") == 1


def test_an_old_lock_that_is_worked_under_stays(lock: Path, tmp_path: Path) -> None:
    """One long compiler call."""
    age(lock)
    compiler = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], cwd=lock.parent)
    waiting = threading.Thread(target=wait_for_compilations, args=(tmp_path, 0.01))
    try:
        waiting.start()
        waiting.join(0.5)
        assert lock.exists()
        assert waiting.is_alive()
    finally:
        compiler.kill()
        compiler.wait()
    waiting.join(10)
    assert not waiting.is_alive()
    assert not lock.exists()


@pytest.mark.parametrize("between", ["", "py311_cpu"])
def test_the_first_use_is_said(between: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        say_first_use(tmp_path)
    assert "compiles an operator on its first use" in caplog.text
    caplog.clear()
    built = tmp_path / between / "deepspeed_shm_comm" / "deepspeed_shm_comm.so"
    built.parent.mkdir(parents=True)
    built.touch()
    with caplog.at_level("INFO"):
        say_first_use(tmp_path)
    assert not caplog.text
