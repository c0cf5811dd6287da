"""A command that is forked from a warm process runs as one of an interpreter of its own, and ends as it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from cli.program import is_alive, wait_for
from launching import rank_environment, warm_folder

TELL = """
import json, os, sys
print(json.dumps({"argv": sys.argv, "path": sys.path, "name": __name__, "file": globals().get("__file__"), "folder": os.getcwd(),
    "environment": {k: v for k, v in os.environ.items() if k.startswith(("TEST_", "RANK"))}, "read": sys.stdin.read()}))
sys.exit(len(sys.argv))
"""


@pytest.fixture(scope="module")
def program() -> str:
    return str(warm_folder() / "python")


@pytest.mark.parametrize("kind", ["-c", "-m", "script"])
def test_a_command_finds_what_it_would_find(kind: str, program: str, tmp_path: Path) -> None:
    script = tmp_path / "telling.py"
    script.write_text(TELL)
    words = {"-c": ["-c", TELL], "-m": ["-m", "telling"], "script": ["-u", str(script)]}[kind]
    found = []
    for interpreter in (sys.executable, program):
        done = subprocess.run(
            [interpreter, *words, "a", "--b"],
            env=rank_environment() | {"TEST_NAME": "value", "RANK": "1"},
            cwd=tmp_path,
            input="asked",
            capture_output=True,
            text=True,
            timeout=100,
        )
        found.append((done.returncode, json.loads(done.stdout)))
    assert found[0] == found[1]
    assert found[1][1]["read"] == "asked"


def test_what_its_ends_are_called(program: str) -> None:
    codes = {
        "1 / 0": 1,
        "import sys; sys.exit('why')": 1,
        "import sys; sys.exit(75)": 75,
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": -signal.SIGKILL,
        "import atexit; atexit.register(print, 'last')": 0,
    }
    for code, expected in codes.items():
        done = subprocess.run(
            [program, "-c", code], env=rank_environment(), capture_output=True, text=True, timeout=100
        )
        assert done.returncode == expected, (code, done)
        assert ("why" in done.stderr, "last" in done.stdout) == ("why" in code, "last" in code)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_reaches_it(number: signal.Signals, program: str) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
    process = subprocess.Popen(
        [program, "-c", code], env=rank_environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert pid != process.pid
    process.send_signal(number)
    assert process.wait(timeout=20) == -number
    assert wait_for(lambda: not is_alive(pid), 20)


def test_what_is_read_while_modules_are_imported_wants_an_interpreter_of_its_own(program: str) -> None:
    said = [
        subprocess.run(
            [program, "-c", "import sys; print(sys.executable)"],
            env=rank_environment() | changes,
            capture_output=True,
            text=True,
            timeout=100,
        ).stdout.strip()
        for changes in ({}, {"RANK": "3"}, {"TRITON_INTERPRET": "1"}, {"OMP_NUM_THREADS": "2"})
    ]
    assert said == [program, program, sys.executable, sys.executable]


def test_whoever_is_killed_before_it_asked_takes_nobody_along(program: str) -> None:
    for said in (b"", (9).to_bytes(8, "big") + b"{}"):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(Path(program).with_name("socket")))
            client.sendall(said)
    done = subprocess.run(
        [program, "-c", "print('there')"], env=rank_environment(), capture_output=True, text=True, timeout=100
    )
    assert done.stdout == "there\n"


def test_what_a_fork_starts_is_forked_too(program: str) -> None:
    inner = "import os, sys; print(os.getppid(), 'torch' in sys.modules)"
    outer = f"import os, subprocess, sys; print(os.getppid(), flush=True); subprocess.run([sys.executable, '-c', {inner!r}])"
    done = subprocess.run(
        [program, "-c", outer], env=rank_environment(), capture_output=True, text=True, timeout=100
    )
    (server,), (its_server, has_imported) = (line.split() for line in done.stdout.splitlines())
    assert (its_server, has_imported) == (server, "True")
