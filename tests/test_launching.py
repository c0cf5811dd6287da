"""How commands are started on ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trace_dist.config import LaunchConfig
from trace_dist.launching import free_port, launch_command, launch_environment

SCRIPT = """
import os
from pathlib import Path

rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
(Path(os.environ["OUT"]) / rank).write_text(size + " " + os.environ["OMP_NUM_THREADS"])
"""


@pytest.mark.launcher
@pytest.mark.parametrize("launcher", ["none", "torchrun", "deepspeed", "accelerate"])
def test_a_module_runs_once_on_every_rank(launcher: str, tmp_path: Path) -> None:
    (tmp_path / "said.py").write_text(SCRIPT)
    num_ranks = 1 if launcher == "none" else 2
    command = launch_command(LaunchConfig(launcher, num_ranks), "said")
    assert command[0] == sys.executable
    (tmp_path / "out").mkdir()
    paths = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    environment = launch_environment(num_threads=1) | {"OUT": str(tmp_path / "out"), "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert found == {str(rank): f"{num_ranks} 1" for rank in range(num_ranks)}


def test_processes_share_the_cores() -> None:
    cores = os.cpu_count() or 1
    assert launch_environment(1)["OMP_NUM_THREADS"] == str(cores)
    assert launch_environment(10 * cores)["OMP_NUM_THREADS"] == "1"
    assert launch_environment(num_threads=3)["OMP_NUM_THREADS"] == "3"


def test_a_free_port_can_be_taken() -> None:
    assert 0 < free_port() < 65536
