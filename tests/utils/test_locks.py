"""One holder at a time, over processes; nothing is left behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from full_disk import full_disk

from trace_dist.utils.launch import process_name
from trace_dist.utils.locks import Held, hold, hold_until_exit, release

OTHER = """
import sys
from pathlib import Path
from trace_dist.utils.locks import hold
with hold(Path(sys.argv[1]), "folder='x'", wait=len(sys.argv) > 2):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def _released() -> Iterator[None]:
    yield
    release()


def other(path: Path, *options: str) -> subprocess.Popen[str]:
    """Another process that holds ``path`` until it reads a line."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", OTHER, str(path), *options], text=True, **pipes)


def test_a_second_holder_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / ".lock"
    process = other(path)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(Held, match=f"^{process_name(process.pid)}$"), hold(path, "folder='x'"):
        pass
    with pytest.raises(
        ValueError, match=r"^folder='x': process \d+ on .* is at work in it; .* another folder$"
    ):
        hold_until_exit(path, "folder='x'")
    hold_until_exit(path, "folder='x'", sharers=[process_name(process.pid)])
    process.communicate("\n", timeout=60)
    assert not path.exists()
    with hold(path, "folder='x'"):
        assert path.read_text() == process_name(os.getpid())
    assert not path.exists()


def test_a_killed_holder_holds_no_longer(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    process = other(path)
    assert process.stdout.readline() == "held\n"
    process.kill()
    process.wait()
    assert path.exists()
    with hold(path, "folder='x'"):
        pass


def test_one_that_waits_gets_a_file_of_its_own(tmp_path: Path) -> None:
    """The first holder removes the file that the second waits for; a third must still find the second."""
    path = tmp_path / ".lock"
    with hold(path, "folder='x'"):
        process = other(path, "wait")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=3)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(Held, match=process_name(process.pid)), hold(path, "folder='x'"):
        pass
    process.communicate("\n", timeout=60)


def test_this_process_may_hold_a_folder_twice_and_lets_go_once(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    hold_until_exit(path, "folder='x'")
    hold_until_exit(path, "folder='x'")
    release()
    assert not path.exists()


def test_a_folder_made_for_the_lock_goes_with_it_unless_it_holds_something(tmp_path: Path) -> None:
    """A command that is refused leaves no empty run folder."""
    made, used, there = tmp_path / "made", tmp_path / "used", tmp_path / "there"
    there.mkdir()
    for folder in (made, used, there):
        with hold(folder / ".lock", f"folder={folder}"):
            if folder == used:
                (folder / "result").write_text("")
    assert not made.exists()
    assert [path.name for path in used.iterdir()] == ["result"]
    assert there.is_dir()


def test_a_full_disk_is_said_with_its_place_and_leaves_nothing(tmp_path: Path) -> None:
    made = tmp_path / "made"
    with full_disk(3), pytest.raises(ValueError, match=r"^folder='x': cannot be written \(File too large\)"):
        hold_until_exit(made / ".lock", "folder='x'")
    assert not made.exists()


def refuse_writing(path: Path, monkeypatch: pytest.MonkeyPatch, *modes: str) -> None:
    """A file that is another user's until it is deleted; ``modes`` of ``open`` are refused."""
    owned, opened = path.stat().st_ino, Path.open

    def opens(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if mode in modes and self == path and path.exists() and path.stat().st_ino == owned:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(self, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", opens)


def test_another_users_file_says_who_is_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Users of one group share a bank; each one's lock file can be read by the others, and its folder written."""
    path = tmp_path / ".lock"
    process = other(path)
    assert process.stdout.readline() == "held\n"
    refuse_writing(path, monkeypatch, "a+b")
    with pytest.raises(Held, match=f"^{process_name(process.pid)}$"), hold(path, "folder='x'"):
        pass
    process.kill()
    process.wait()
    kept = os.open(path, os.O_RDONLY)  # its number is not given to another file
    with hold(path, "folder='x'"):
        assert path.read_text() == process_name(os.getpid())
    os.close(kept)
    assert not path.exists()


def test_another_users_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ".lock"
    path.write_text("process 1 on there")
    refuse_writing(path, monkeypatch, "a+b", "rb")
    with pytest.raises(
        ValueError, match=r"\.lock: the lock file is another user's and cannot be read; .* delete it"
    ):
        hold_until_exit(path, "folder='x'")
    assert path.exists()
