"""Files are whole or absent, whatever happens while they are written; what cannot be read is one clear line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trace_dist.utils import files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def crash_halfway(path: Path) -> None:
    with files.atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("crash")


def test_a_failure_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(RuntimeError, match="crash"):
        crash_halfway(path)
    assert files.read_json(path) == {"old": 1}
    assert names(tmp_path) == ["a.json"]


def test_a_value_that_is_no_json_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"new": object()})
    with pytest.raises(ValueError, match="Out of range float"):
        files.write_json(path, {"new": float("nan")})
    assert files.read_json(path) == {"old": 1}
    assert names(tmp_path) == ["a.json"]


KILLED = """
import sys, time
from pathlib import Path
from trace_dist.utils.files import atomic_path
with atomic_path(Path(sys.argv[1])) as temporary:
    with temporary.open("w") as handle:
        handle.write("half")
        handle.flush()
        print("written", flush=True)
        time.sleep(60)
"""


def test_a_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "written"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert path.read_text() == "old"
    files.write_text(path, "new")
    assert path.read_text() == "new"
    # What it has half written goes, once nobody can be writing it, with the next file of the folder.
    (left,) = set(names(tmp_path)) - {"a.txt"}
    other = tmp_path / left.replace(files._host(), "0a0a0a0a")
    other.write_text("of another host")
    mine = tmp_path / f".b.txt.{files._host()}-{os.getpid()}.tmp"
    mine.write_text("of a process that is there")
    for each in (tmp_path / left, other, mine):
        os.utime(each, (1, 1))
    files._remove_abandoned_files.cache_clear()
    files.write_text(tmp_path / "c.txt", "")
    assert names(tmp_path) == sorted(["a.txt", "c.txt", other.name, mine.name])


DIES = """
import os, sys
from pathlib import Path
from trace_dist.utils import files
with files.atomic_folder(Path(sys.argv[1])) as temporary:
    (temporary / "weights").write_bytes(bytes(1000))
    if sys.argv[2] == "waits":
        print("here", flush=True)
        sys.stdin.read()
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_has_half_written_goes_with_the_next_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an export it holds all weights of a model. What another process is writing stays, also of one in another container."""
    command = [sys.executable, "-c", DIES, str(tmp_path / "out")]
    assert subprocess.run([*command, "at once"]).returncode == -signal.SIGKILL
    (dead,) = names(tmp_path)
    with subprocess.Popen([*command, "waits"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"here\n"
        (alive,) = names(tmp_path)
        assert alive != dead
        with files.atomic_folder(tmp_path / "out") as mine:
            assert names(tmp_path) == sorted([alive, mine.name])
        (tmp_path / "out").rmdir()
        monkeypatch.setattr(files.psutil, "pid_exists", lambda _: False)
        with files.atomic_folder(tmp_path / "out"):
            assert alive in names(tmp_path)
        other.kill()
    monkeypatch.undo()
    with files.atomic_folder(tmp_path / "else"):
        assert alive in names(tmp_path)
    with files.filled_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == [alive, "else", "out"]


def test_folders_are_made_and_text_is_utf8(tmp_path: Path) -> None:
    path = tmp_path / "b" / "c" / "a.txt"
    files.write_text(path, "π · ≤")
    assert path.read_bytes() == "π · ≤".encode()
    files.write_json(path, ["≤"])
    assert files.read_json(path) == ["≤"]


def test_utf8_does_not_depend_on_the_locale(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from trace_dist.utils.files import write_text;"
    code += "write_text(Path(sys.argv[1]), chr(960))"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], env=environment, check=True)
    assert (tmp_path / "a").read_bytes() == "π".encode()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=r"/file/a\.json: cannot be written \(File exists\); check permissions"
    ):
        files.write_json(tmp_path / "file" / "a.json", 1)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"/folder: cannot be written \(Is a directory\); "):
        files.write_text(tmp_path / "folder", "text")
    assert names(tmp_path) == ["file", "folder"]


def test_a_disk_that_fills_up_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    """A real limit on the size of files stands for the full disk."""
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from trace_dist.utils.files import write_text\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    write_text(Path(sys.argv[1]), 'x' * 10_000)\n"
        "except ValueError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert "cannot be written (File too large); check permissions and free space" in done.stdout
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_too_little_space_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 3 * 2**20})
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
    small, large = {"x": torch.zeros(2**10)}, {"x": torch.zeros(2**20)}
    files.save_tensors(tmp_path / "new" / "x", small, {"format": "trace_dist.x"})
    before = (tmp_path / "new" / "x").read_bytes()
    message = (
        r"/new: 5\.0 MiB are needed but 3\.0 MiB are free; free some disk space or choose another folder"
    )
    with pytest.raises(ValueError, match=message):
        files.save_tensors(tmp_path / "new" / "x", large, {"format": "trace_dist.x"})
    assert (tmp_path / "new" / "x").read_bytes() == before
    with pytest.raises(ValueError, match="MiB are needed"):
        files.check_free_space(tmp_path / "not" / "there" / "yet", 2**30)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; run the command that writes it first, or fix the path"),
        (b"", "not valid JSON .*; restore the file or delete it and run again"),
        (b'{"a": 1', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_json_that_cannot_be_read(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path}: {message}"):
        files.read_json(path)


def test_a_folder_is_no_json_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory\); fix the path"):
        files.read_json(tmp_path)


def test_tensors_round_trip_with_their_header(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).view(2, 3).T, "b": torch.zeros(0), "c": torch.tensor(2.0).bfloat16()}
    header = {"format": "trace_dist.thing", "name": "π"}
    files.save_tensors(tmp_path / "x", tensors, header)
    loaded, same = files.load_tensors(tmp_path / "x", "thing")
    assert same == header
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_tensors_of_another_kind_or_none(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, str(tmp_path / "x"))
    with pytest.raises(
        ValueError, match=r"format is None, not 'trace_dist\.thing'; this is not a thing file"
    ):
        files.load_tensors(tmp_path / "x", "thing")
    with pytest.raises(ValueError, match="no such thing file; check the path"):
        files.load_tensors(tmp_path / "y", "thing")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])
    with pytest.raises(ValueError, match="corrupt thing file"):
        files.load_tensors(tmp_path / "x", "thing")


def test_lines_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "new" / "m.jsonl"
    for step in (1, 2):
        files.append_jsonl(path, {"step": step})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert files.sha256(tmp_path / "x").startswith("ba7816bf8f01cfea")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_are_read_by_whom_the_umask_lets(umask: int, mode: int, tmp_path: Path) -> None:
    """safetensors makes files that their owner alone can read, whatever the umask: nobody else could use a bank or an export."""
    before = os.umask(umask)
    try:
        files.save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {"format": "trace_dist.mask"})
        for name, folder in (("new", files.atomic_folder), ("filled", files.filled_folder)):
            with folder(tmp_path / name) as temporary:
                save_file({"x": torch.ones(2)}, temporary / "b.safetensors")
        with files.filled_folder(tmp_path / "filled") as temporary:
            save_file({"x": torch.ones(2)}, temporary / "c.safetensors")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.safetensors")}
    assert set(modes) == {"a.safetensors", "b.safetensors", "c.safetensors"}
    assert set(modes.values()) == {mode}
