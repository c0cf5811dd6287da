"""Ranks end with their launcher, and with each other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli.program import is_alive
from launching import free_port, rank_environment

pytestmark = pytest.mark.launcher
PYTHON = [sys.executable, "-m"]


def begin(launcher: list[str], folder: Path, behaviour: str) -> subprocess.Popen[str]:
    own = rank_environment()
    own["PYTHONPATH"] += f"{os.pathsep}{Path(__file__).parent}"
    return subprocess.Popen(
        [*PYTHON, *launcher, str(folder), behaviour],
        env=own,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def pids(folder: Path, process: subprocess.Popen[str]) -> list[int]:
    """The two ranks, once they have met."""
    files = [folder / f"pid-{rank}" for rank in range(2)]
    deadline = time.monotonic() + 60
    while not all(file.is_file() and file.read_text() for file in files):
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [int(file.read_text()) for file in files]


def test_sigterm_to_the_launcher_of_deepspeed_leaves_no_rank(tmp_path: Path) -> None:
    """It passes nothing on, and one rank waits for the other in a collective."""
    launcher = [
        "deepspeed.launcher.runner",
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
        "--module",
        "living",
    ]
    process = begin(launcher, tmp_path, "alone")
    ranks = pids(tmp_path, process)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=10)
    deadline = time.monotonic() + 3
    while any(map(is_alive, ranks)) and time.monotonic() < deadline:
        time.sleep(0.02)
    left = [rank for rank in ranks if is_alive(rank)]
    process.communicate(timeout=30)
    assert left == []


def test_a_killed_rank_is_named_under_torchrun(tmp_path: Path) -> None:
    launcher = [
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
        "-m",
        "living",
    ]
    process = begin(launcher, tmp_path, "kill")
    ranks = pids(tmp_path, process)
    said = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert not any(map(is_alive, ranks))
    named = [line for line in said.splitlines() if line.startswith("error: lost contact: rank 1 on ")]
    assert len(named) == 1, said[-3000:]
    assert "has ended without a word; it was in train" in named[0]


TALKS = """
import sys
from trace_dist.cli.lifetime import outlive_terminals
outlive_terminals()
print("ready", flush=True)
sys.stdin.readline()
for stream in (sys.stdout, sys.stderr):
    print("a word to nobody", file=stream, flush=True)
"""


def test_a_command_goes_on_without_its_terminal() -> None:
    """A job that was disowned ended with `Input/output error` at its next word."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TALKS],
        env=rank_environment(),
        stdin=subprocess.PIPE,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    read = b""
    while not read.endswith(b"\n"):
        read += os.read(ours, 100)
    os.close(ours)
    time.sleep(0.5)
    process.communicate(b"\n", timeout=30)
    assert process.returncode == 0
