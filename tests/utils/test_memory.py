"""How much memory a process of a container may take."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from trace_dist.utils import held, memory
from trace_dist.utils.memory import available_bytes

MIB = 2**20


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / f"memory.{name}").write_text(f"{value}\n")


def first(root: Path, usage: int, limit: int, inactive: int = 0) -> None:
    write(root, usage_in_bytes=usage, limit_in_bytes=limit, stat=f"total_inactive_file {inactive}")


def second(root: Path, usage: int, limit: object, inactive: int = 0) -> None:
    write(root, current=usage, max=limit, stat=f"anon 5\ninactive_file {inactive}")


def proc(root: Path, *lines: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))
    return root / "sys/fs/cgroup"


def test_a_limit_of_version_2_above_the_own_group(tmp_path: Path) -> None:
    top = proc(tmp_path, "0::/slice/job")
    second(top / "slice/job", 3 * MIB, "max")
    second(top / "slice", 5 * MIB, 8 * MIB, inactive=MIB)
    assert available_bytes(tmp_path) == 4 * MIB
    second(top / "slice/job", 3 * MIB, 5 * MIB)
    assert available_bytes(tmp_path) == 2 * MIB
    second(top / "slice/job", 6 * MIB, 5 * MIB)
    assert available_bytes(tmp_path) == 0


def test_a_container_of_version_1_sees_its_own_group_as_the_topmost(tmp_path: Path) -> None:
    top = proc(tmp_path, "5:devices:/docker/abc", "4:cpu,memory:/docker/abc", "0::/docker/abc")
    first(top / "memory", 3 * MIB, 8 * MIB, inactive=2 * MIB)
    assert available_bytes(tmp_path) == 7 * MIB


@pytest.mark.parametrize("lines", [(), ("4:memory:/",), ("0::/",), ("9:name=systemd:/",)])
def test_without_a_limit_it_is_what_is_free(lines: tuple[str, ...], tmp_path: Path) -> None:
    top = proc(tmp_path, *lines)
    first(top / "memory", 3, 9223372036854771712)
    second(top, 3, "max")
    most = psutil.virtual_memory().total
    assert most // 100 < available_bytes(tmp_path) <= most
    assert available_bytes(tmp_path / "nowhere") > most // 100


def test_what_fits_knows_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_rooms", lambda _: [10 * MIB])
    assert held.free_bytes(torch.device("cpu")) == 10 * MIB
    assert held.fits(5 * MIB)
    assert not held.fits(6 * MIB)
