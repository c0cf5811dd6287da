"""Whoever starts ranks answers for them: signals, exit codes, and nothing left behind. The ranks here load no torch."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli.program import is_alive

from trace_dist.config import LaunchConfig
from trace_dist.launching import commands, supervisor
from trace_dist.launching.commands import Start
from trace_dist.launching.supervisor import Supervisor, is_loss
from trace_dist.utils.stopping import STOP

MODULE = """
import os, signal, subprocess, sys, time
behaviour, folder = sys.argv[1:]
if behaviour == "loud":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Traceback (most recent call last)"))
if behaviour == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(folder + "/pids.new", "w").write(f"{os.getpid()} {child.pid}")
os.rename(folder + "/pids.new", folder + "/pids")
if behaviour == "lost":
    child.kill()
    print("error: lost contact: rank 1 on node-2 has ended", file=sys.stderr)
    sys.exit(1)
if behaviour == "explain":
    child.kill()
    print("error [rank 2]: x.json: cannot be written (No space left on device)", file=sys.stderr)
    sys.exit(1)  # as torchrun
if behaviour == "fail":
    child.kill()
    sys.exit(2)
while not os.path.exists(os.environ["TRACE_DIST_STOP"]):
    time.sleep(0.02)
child.kill()
sys.exit(1)  # as torchrun
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "acting.py").write_text(MODULE)
    return tmp_path


def begin(folder: Path, behaviour: str, module: str = "supervisor") -> subprocess.Popen[str]:
    paths = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    words = [json.dumps({"launcher": "none"})] if module == "supervisor" else [sys.executable, "-m"]
    unset = {"TRACE_DIST_STOP", "SLURM_JOB_ID"}
    own = {name: value for name, value in os.environ.items() if name not in unset} | {"PYTHONPATH": paths}
    own |= {"TRACE_DIST_STOP": str(folder / "stop")} if module == "tether" else {}
    return subprocess.Popen(
        [sys.executable, "-m", f"trace_dist.launching.{module}", *words, "acting", behaviour, str(folder)],
        env=own, cwd=folder, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def pids(folder: Path) -> list[int]:
    deadline = time.monotonic() + 30
    while not (folder / "pids").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return list(map(int, (folder / "pids").read_text().split()))


@pytest.mark.parametrize("behaviour", ["wait", "deaf"])
def test_sigterm_leaves_nothing(folder: Path, behaviour: str) -> None:
    process = begin(folder, behaviour)
    below = pids(folder)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert not any(map(is_alive, below))


@pytest.mark.parametrize(("number", "told"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_what_ctrl_c_ends_says_nothing_more(folder: Path, number: signal.Signals, told: bool) -> None:
    """Each launcher and rank printed a traceback of where it was."""
    process = begin(folder, "loud")
    pids(folder)
    process.send_signal(number)
    said = process.communicate(timeout=20)[1]
    assert (process.returncode, "Traceback" in said) == (128 + number, told)


def test_sigusr1_asks_to_stop(folder: Path) -> None:
    """The launcher's own exit code says nothing; ours says that it goes on when it is started again."""
    process = begin(folder, "wait")
    pids(folder)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=20)
    assert process.returncode == 75


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 75)]
)
def test_a_signal_that_comes_before_the_ranks_begin(
    folder: Path, number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They had begun all the same, and nobody had told them."""
    monkeypatch.delenv(STOP, raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.chdir(folder)

    def starts(*_: object) -> list[Start]:
        signal.raise_signal(number)
        return [Start([sys.executable, "-m", "acting", "wait", str(folder)])]

    monkeypatch.setattr(supervisor, "starts", starts)
    monkeypatch.setattr(supervisor, "GRACE_SECONDS", 20.0)
    begun = time.monotonic()
    assert supervisor.supervise(LaunchConfig(), "acting", []) == code
    assert time.monotonic() - begun < 15


def test_a_full_place_for_temporary_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the folder of what launchers read, and for a file in it."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    monkeypatch.setattr(Path, "write_text", refuse)
    full = r"cannot be written \(No space left on device\)"
    with pytest.raises(ValueError, match=f"TMPDIR='{tmp_path}': {full}"):
        supervisor.supervise(LaunchConfig(), "acting", [])
    with pytest.raises(ValueError, match=f"{tmp_path}/deepspeed_env: {full}"):
        commands._environment_file({}, tmp_path)


@pytest.mark.parametrize(("behaviour", "code"), [("lost", 75), ("fail", 2), ("explain", 2)])
def test_exit_codes(folder: Path, behaviour: str, code: int) -> None:
    process = begin(folder, behaviour)
    said = process.communicate(timeout=20)[1]
    assert process.returncode == code
    assert ("lost contact" in said) == (behaviour == "lost")


def test_what_is_tethered_ends_with_the_other_end(folder: Path) -> None:
    process = begin(folder, "wait", "tether")
    below = pids(folder)
    assert all(map(is_alive, below))
    assert process.stdin is not None
    process.stdin.close()
    process.wait(timeout=20)
    assert not any(map(is_alive, below))
    process.stdin = None
    process.communicate()


@pytest.mark.parametrize(
    ("line", "loss"),
    [
        (b"error: lost contact: rank 1 on b has ended\n", True),
        (b"error [rank 12]: lost contact: rank 0 on a has given no sign\n", True),
        (b"  exitcode  : -9 (pid: 7)\n", True),
        (b"[launch.py] ['python'] exits with return code = -9\n", True),
        (b"error: train.lr=1: too high\n", False),
        (b"  exitcode  : 1 (pid: 7)\n", False),
    ],
)
def test_what_is_a_loss(line: bytes, loss: bool) -> None:
    assert is_loss(line) == loss


def test_a_launcher_that_waits_for_a_stopped_rank_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank has named the lost one and ended; torchrun would wait for the other, which hears no SIGTERM."""
    launcher = """
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"])
print("error: lost contact: rank 1 on node-1 has given no sign of life for 60 s", file=sys.stderr, flush=True)
open(sys.argv[1], "w").write(str(child.pid))
child.wait()
"""
    monkeypatch.setattr(supervisor, "LOST_SECONDS", 0.5)
    monkeypatch.setattr(supervisor, "OTHERS_SECONDS", 1e9)
    start = Start([sys.executable, "-c", launcher, str(tmp_path / "pid")])
    job = Supervisor([start], os.environ | {STOP: str(tmp_path / "stop")})
    assert job.wait() == 75
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_a_program_that_is_not_there_leaves_nothing_running(tmp_path: Path) -> None:
    """The ranks of the first host would wait for those of the second, which no ssh has started."""
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    begun = iter([Start([sys.executable, "-c", child]), Start(["no-such-ssh", "node-2"], "node-2")])

    def one_by_one() -> Iterator[Start]:
        yield next(begun)
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.02)
        yield next(begun)

    with pytest.raises(
        ValueError, match=r"^no-such-ssh: cannot be started here \(No such file or directory\); "
    ):
        Supervisor(one_by_one(), os.environ | {STOP: str(tmp_path / "stop")})
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_srun_that_is_not_there_is_one_line(folder: Path) -> None:
    words = [json.dumps({"launcher": "slurm", "num_ranks": 2}), "acting", "wait", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "trace_dist.launching.supervisor", *words],
        env=os.environ | {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-1", "PATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: srun: cannot be started here (No such file or directory); install it, or put it on the PATH"
    ]
