"""Rank 0 looks whether a file is there; other ranks open it once it must be, and wait for it."""

from __future__ import annotations

import ast
import threading
from pathlib import Path

import pytest

from trace_dist.utils import dist
from trace_dist.utils.shared_files import present

PACKAGE = Path(dist.__file__).parents[1]
LOOKS = {"is_file", "is_dir", "exists", "done"}


def as_rank(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "rank", lambda: number)


def test_a_file_that_comes_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(1, monkeypatch)
    path = tmp_path / "mask"
    writer = threading.Timer(0.3, path.touch)
    writer.start()
    assert present(path, seconds=20) == path
    assert path.is_file()
    writer.join()


def test_one_that_never_comes_is_named_with_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(1, monkeypatch)
    monkeypatch.setattr("socket.gethostname", lambda: "node-7")
    with pytest.raises(
        ValueError, match=r"mask: node-7 does not see .* after 0.1 s; put it on a file system"
    ):
        present(tmp_path / "mask", seconds=0.1)


def test_rank_0_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(0, monkeypatch)
    monkeypatch.setattr(Path, "is_file", lambda _: pytest.fail("rank 0 looks"))
    assert present(tmp_path / "mask") == tmp_path / "mask"


def test_no_rank_looks_before_it_is_told() -> None:
    """What goes to ``broadcast_object`` is worked out on every rank, and so is what ``on_all`` does."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            function = (
                call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            )
            if function in ("broadcast_object", "on_all"):
                inside = [node for argument in call.args for node in ast.walk(argument)]
                names = {node.attr for node in inside if isinstance(node, ast.Attribute)}
                if names & LOOKS:
                    found.append(f"{path.relative_to(PACKAGE)}:{call.lineno}")
    assert found == []
