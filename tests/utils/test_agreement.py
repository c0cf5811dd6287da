"""Three real ranks that differ: each of them learns what, who, and which values, and none waits."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from launching import free_port, python, rank_environment

from trace_dist.utils.agreement import agree
from trace_dist.utils.together import first_once_per_host, on_all, on_main

RANKS = """
import json, socket, sys
from pathlib import Path
from trace_dist.utils import dist
from trace_dist.utils.agreement import agree
from trace_dist.utils.together import first_once_per_host, on_all, on_main
dist.init_distributed()
rank = dist.rank()
def refused(action):
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
def fail(error):
    raise error
cache = Path(sys.argv[1])
socket.gethostname = lambda: "bab"[rank]
def cached(name):
    before = sorted(path.name for path in cache.glob(f"{name}-*"))
    (cache / f"{name}-{rank}").touch()
    return before
def fail_on(failing):
    cached(f"failing{failing}")
    return rank if rank != failing else fail(ValueError(f"rank {failing} fails"))
found = {
    "same": refused(lambda: agree({"a": 1, "b": [2, 3]})),
    "one": refused(lambda: agree({"steps": 9, "train.lr": 1e-3 if rank == 1 else 3e-3})),
    "absent": refused(lambda: agree({"a": 1} | ({"extra": 2} if rank == 2 else {}))),
    "many": refused(lambda: agree({name: rank for name in "abcde"})),
    "long": refused(lambda: agree({"text": "x" * 500 + str(rank)})),
    "user": refused(lambda: on_main(lambda: fail(ValueError("field=1: wrong; mend it")))),
    "fault": refused(lambda: on_main(lambda: fail(OSError("disk")))),
    "value": on_main(lambda: 7),
    "own": on_all(lambda: rank),
    "one of all": refused(lambda: on_all(lambda: fail(ValueError("mine")) if rank == 1 else rank)),
    "fault of all": refused(lambda: on_all(lambda: fail(KeyError("mine")) if rank == 1 else rank)),
    "before": first_once_per_host(lambda: cached("cache")),
    "first fails": refused(lambda: first_once_per_host(lambda: fail_on(1))),
    "last fails": refused(lambda: first_once_per_host(lambda: fail_on(2))),
}
dist.barrier()
found["marks"] = sorted(path.name for path in cache.glob("failing*"))
with open(f"{sys.argv[1]}/{rank}.json", "w") as out:
    json.dump(found, out)
dist.close()
"""
CURE = "the ranks differ; start every rank with the same command, configuration, code and data"


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Ranks as mpirun would start them."""
    out = tmp_path_factory.mktemp("agreement")
    common = rank_environment() | {"MASTER_PORT": str(free_port())}
    common["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), common["PYTHONPATH"]])
    prefix = "OMPI_COMM_WORLD"
    sizes = {f"{prefix}_SIZE": "3", f"{prefix}_LOCAL_SIZE": "3"}
    command = [python(), "-c", RANKS, str(out)]
    ranks = [
        subprocess.Popen(
            command, env=common | sizes | {f"{prefix}_RANK": str(rank), f"{prefix}_LOCAL_RANK": str(rank)}
        )
        for rank in range(3)
    ]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(3)]


def test_every_rank_is_told_the_same(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert report["same"] is None
        assert report["one"] == f"ValueError: train.lr: ranks 0, 2 have 0.003, rank 1 has 0.001: {CURE}"
        assert report["absent"] == f"ValueError: extra: ranks 0-1 have nothing, rank 2 has 2: {CURE}"
        assert report["many"].startswith("ValueError: a: rank 0 has 0, rank 1 has 1, rank 2 has 2; b: ")
        assert f"(and 2 fields more): {CURE}" in report["many"]
        assert len(report["long"]) < 500
        assert report["user"] == "ValueError: field=1: wrong; mend it"


def test_what_rank_0_does_is_known_to_all(reports: list[dict[str, Any]]) -> None:
    assert [report["fault"] for report in reports] == ["OSError: disk", *["RuntimeError: disk"] * 2]
    assert [report["value"] for report in reports] == [7, 7, 7]


def test_what_fails_on_one_rank_fails_on_all(reports: list[dict[str, Any]]) -> None:
    assert [report["own"] for report in reports] == [0, 1, 2]
    assert [report["one of all"] for report in reports] == ["ValueError: mine"] * 3
    theirs = "RuntimeError: 'mine'"
    assert [report["fault of all"] for report in reports] == [theirs, "KeyError: 'mine'", theirs]


def test_the_first_rank_of_each_host_works_before_the_others(reports: list[dict[str, Any]]) -> None:
    """Ranks 0 and 2 share a host; where one rank fails all do, at once."""
    assert reports[2]["before"] == ["cache-0", "cache-1"]
    for report in reports[:2]:
        assert "cache-2" not in report["before"]
    for report in reports:
        assert report["first fails"] == "ValueError: rank 1 fails"
        assert report["last fails"] == "ValueError: rank 2 fails"
        assert report["marks"] == ["failing1-0", "failing1-1", "failing2-0", "failing2-1", "failing2-2"]


def test_one_process_agrees_with_itself() -> None:
    agree({"a": 1})
    assert on_main(lambda: "done") == on_all(lambda: "done") == first_once_per_host(lambda: "done") == "done"
