"""How a command is started as a process of its own: alone, or on the ranks of this machine by a launcher."""

from __future__ import annotations

import os
import socket
import sys

from trace_dist.config import LaunchConfig
from trace_dist.utils.launch import LAUNCHERS

RUN_PID = "TRACE_DIST_RUN_PID"
"""Environment variable of a run's stages, which their launchers pass on: the process that must live while they do."""


class ProcessFailed(Exception):
    """A command that was started as a process of its own has failed and said why."""


def launch_command(launch: LaunchConfig, module: str = "trace_dist") -> list[str]:
    """How a module is started on the ranks of a configuration, up to and including its name."""
    ranks, port = str(launch.num_ranks), str(free_port())
    if launch.launcher == "none":
        return [sys.executable, "-m", module]
    if launch.launcher == "deepspeed":
        start = ["-m", "deepspeed.launcher.runner", "--num_gpus", ranks, "--master_port", port, "--module"]
        return [sys.executable, *start, module]
    if launch.launcher == "torchrun":
        start = ["-m", "torch.distributed.run", "--nproc_per_node", ranks, "--master_port", port]
        return [sys.executable, *start, "-m", module]
    start = ["-m", "accelerate.commands.launch", "--num_processes", ranks, "--main_process_port", port]
    start += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    # Its word for several processes; without a GPU they compute on the CPU.
    start += ["--multi_gpu"]
    return [sys.executable, *start, "-m", module]


def shown_launch(launch: LaunchConfig) -> str:
    """How a user starts a command on the ranks of a configuration: what stands before the command's name."""
    ranks = launch.num_ranks
    return {
        "none": "trace-dist",
        "deepspeed": f"deepspeed --num_gpus {ranks} --module trace_dist",
        "torchrun": f"torchrun --nproc_per_node {ranks} -m trace_dist",
        "accelerate": f"accelerate launch --num_processes {ranks} -m trace_dist",
    }[launch.launcher]


def launch_environment(num_processes: int = 1, num_threads: int | None = None) -> dict[str, str]:
    """The environment of each of some processes on this machine.

    Args:
        num_processes: how many run at the same time; they share the cores.
        num_threads: of each; its share of the cores when None.
    """
    import torch

    environment = dict(os.environ)
    share = max(1, (os.cpu_count() or 1) // num_processes)
    environment["OMP_NUM_THREADS"] = str(share if num_threads is None else num_threads)
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    return environment


def alone_environment() -> dict[str, str]:
    """The environment of a process of its own, started by a rank: no launcher is to be seen in it."""
    environment = launch_environment()
    names = {name for launcher in LAUNCHERS for name in (launcher.rank, launcher.size, launcher.local_rank)}
    names |= {
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
    }
    hidden = ("TORCHELASTIC_", "SLURM_STEP")
    return {
        name: value
        for name, value in environment.items()
        if name not in names and not name.startswith(hidden)
    }


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
