"""Starting a script on several ranks, through the launchers that users have."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Literal

from warm.start import start

Launcher = Literal["python", "torchrun", "deepspeed"]
TESTS = Path(__file__).parent


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(gpus: bool = False) -> dict[str, str]:
    """The environment of a rank: CPU or a GPU, one thread, no launcher's variables, and this folder importable."""
    bin_folder = str(Path(sys.executable).parent)  # where DeepSpeed finds ninja
    hidden = {} if gpus else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    kept = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    }
    return {
        **kept,
        **hidden,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(TESTS)))),
    }


@cache
def warm_folder() -> Path:
    """Where ``python`` and the launchers' programs lie that need not import what commands import."""
    return start(rank_environment())


def python() -> str:
    """What starts a command where a test asks what it does; with TRACE_DIST_TESTS_COLD, the interpreter of the tests."""
    return sys.executable if os.environ.get("TRACE_DIST_TESTS_COLD") else str(warm_folder() / "python")


def launch(
    script: Path,
    num_ranks: int,
    *args: object,
    launcher: Launcher,
    timeout: float = 900,
    warm: bool = True,
    gpus: bool = False,
) -> None:
    """Run ``script args...`` on ``num_ranks`` ranks of this machine, on CPUs or each on a GPU (then not ``warm``); fails
    with what they wrote to standard error."""
    program, port = python() if warm else sys.executable, str(free_port())
    words = {
        "python": [program],
        "torchrun": [
            program,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(num_ranks),
            "--master_port",
            port,
        ],
        "deepspeed": [
            program,
            "-m",
            "deepspeed.launcher.runner",
            "--num_gpus",
            str(num_ranks),
            "--master_port",
            port,
        ],
    }[launcher]
    done = subprocess.run(
        [*words, str(script), *map(str, args)],
        env=rank_environment(gpus),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
