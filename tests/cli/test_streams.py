"""Standard streams that are closed, or take no more, as the real program meets them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from bank.samples import drawn

from trace_dist import DeltaBank
from trace_dist.bank.bank import BASE
from trace_dist.utils.codes import FAILED

FULL = "error: standard output: No space left on device; check paths, permissions and free space"


def ended(redirection: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """``trace-dist`` with some words, started by a shell that redirects its streams."""
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-m", "trace_dist", *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | variables, check=False
    )


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    made = DeltaBank.create(tmp_path / "bank", "aaaa", layer=1)
    made.add(drawn(BASE, 0), None)
    return tmp_path / "bank"


def test_closed_streams_are_no_error(bank: Path) -> None:
    done = ended("<&- >&-", "bank", "show", str(bank))
    assert (done.returncode, done.stderr) == (0, "")
    assert ended("<&- >&- 2>&-", "--version").returncode == 0
    assert ended("<&- >&- 2>&-", "nonsense").returncode == FAILED


def test_what_is_started_has_its_streams_too() -> None:
    """What a file that is opened later gets is no number of a standard stream."""
    text = (
        "from trace_dist.cli.streams import open_streams\n"
        "import os, sys\n"
        "open_streams()\n"
        "places = {os.readlink(f'/proc/self/fd/{number}') for number in range(3)}\n"
        "assert all(os.get_inheritable(number) for number in range(3))\n"
        "assert None not in (sys.stdin, sys.stdout, sys.stderr)\n"
        "sys.exit(0 if places == {os.devnull} else 3)\n"
    )
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", text]
    assert subprocess.run(command, timeout=300, check=False).returncode == 0


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("command", ["bank", "--version"])
def test_a_full_output_is_named(unbuffered: str, command: str, bank: Path) -> None:
    words = ["bank", "show", str(bank)] if command == "bank" else [command]
    done = ended("> /dev/full", *words, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == FAILED
    assert done.stderr.startswith(FULL)
    assert len(done.stderr.splitlines()) == 1
