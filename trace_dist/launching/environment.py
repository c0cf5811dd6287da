"""The environment of a process that is started: what its launcher shall see, and what other hosts are told."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from math import ceil

from trace_dist.config import LaunchConfig
from trace_dist.launching.hosts import hosts_of
from trace_dist.utils.codes import FAILED
from trace_dist.utils.launch import LAUNCHERS, process_name

RUN_PID = "TRACE_DIST_RUN_PID"
"""Environment variable of what a run starts, which launchers pass on: the process that must live while it does."""
RUN_HOST = "TRACE_DIST_RUN_HOST"
"""The host of that process."""
FORWARDED = (
    *("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "DEEPSPEED_TIMEOUT", "TOKENIZERS_PARALLELISM"),
    *("TRACE_*", "DS_*", "OMP_*", "MKL_*", "GLOO_*", "NCCL_*", "TORCH_*", "TORCHELASTIC_*", "TRITON_*"),
    *("HF_*", "TRANSFORMERS_*", "PYTHON*", "PYTORCH_*", "CUBLAS_*", "UCX_*", "FI_*", "CUDA_HOME", "LC_ALL"),
    *("RCCL_*", "HSA_*", "MIOPEN_*", "ROCM_*", "NVIDIA_TF32_OVERRIDE", "CUDA_DEVICE_MAX_CONNECTIONS"),
)
"""Variables that every host is told, where they are set here."""
SECRET = re.compile(r"TOKEN(?!IZERS)|KEY|SECRET|PASSW")
"""Never told: command lines can be read by everyone on a host."""
RANKS = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *(name for launcher in LAUNCHERS for name in (launcher.rank, launcher.size, launcher.local_rank)),
)
"""Variables by which launchers tell a process which rank it is."""


class ProcessFailed(Exception):
    """A command that was started as a process of its own has failed and said why.

    Attributes:
        code: exit code for whoever started it.
    """

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


def launch_environment(num_processes: int = 1, num_threads: int | None = None) -> dict[str, str]:
    """The environment of each of some processes on this machine.

    Args:
        num_processes: how many run at the same time; they share the cores.
        num_threads: of each; when None, what ``OMP_NUM_THREADS`` says here, or else its share of the cores.
    """
    import torch

    environment = _with_threads(num_processes, num_threads)
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    return environment


def ranks_environment(launch: LaunchConfig, together: int = 1) -> dict[str, str]:
    """The environment of the ranks of a configuration.

    On other machines each rank finds its accelerator itself. Hosts are taken to be like this one, whose cores are shared as on
    the host with most ranks; Slurm says how many cores a rank has, where it was asked for them.

    Args:
        launch: how they are started.
        together: jobs like this one that run at the same time.

    Raises:
        ValueError: the hosts are not as they must be.
    """
    if launch.launcher == "slurm":
        cores, nodes = (os.environ.get(f"SLURM_{name}", "") for name in ("CPUS_PER_TASK", "JOB_NUM_NODES"))
        chosen = cores.isdecimal() and not os.environ.get("OMP_NUM_THREADS")
        of_node = ceil(launch.num_ranks / int(nodes)) if nodes.isdecimal() else launch.num_ranks
        return _with_threads(together * of_node, int(cores) if chosen else None)
    if hosts := hosts_of(launch):
        return _with_threads(together * max(host.slots for host in hosts))
    return launch_environment(together * launch.num_ranks)


def num_cores() -> int:
    """Cores that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def _with_threads(num_processes: int, num_threads: int | None = None) -> dict[str, str]:
    """This process's environment with a number of threads, as ``launch_environment``."""
    environment = dict(os.environ)
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    elif not environment.get("OMP_NUM_THREADS"):
        environment["OMP_NUM_THREADS"] = str(max(1, num_cores() // num_processes))
    return environment


def alone_environment() -> dict[str, str]:
    """The environment of a process of its own, started by a rank while all ranks wait: no launcher is to be seen in it, nor the
    number of threads that it gave its ranks."""
    hidden = ("TORCHELASTIC_", "SLURM_STEP")
    return {
        name: value
        for name, value in launch_environment(num_threads=num_cores()).items()
        if name not in RANKS and not name.startswith(hidden)
    }


def followed(pid: int) -> dict[str, str]:
    """What tells processes to end with a process of this host."""
    return {RUN_PID: str(pid), RUN_HOST: socket.gethostname()}


def run_process() -> tuple[int, str] | None:
    """The process that this one follows, and its host; None where there is none."""
    if not os.environ.get(RUN_PID, "").isdecimal():
        return None
    return int(os.environ[RUN_PID]), os.environ.get(RUN_HOST, socket.gethostname())


def run_holders() -> list[str]:
    """Who holds locks that this process may share: the command that it is a stage of."""
    run = run_process()
    return [] if run is None else [process_name(*run)]


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """What of an environment other hosts are told; nothing that looks like a secret."""
    exact = {name for name in FORWARDED if not name.endswith("*")}
    starts = tuple(name[:-1] for name in FORWARDED if name.endswith("*"))
    return {
        name: value
        for name, value in environment.items()
        if (name in exact or name.startswith(starts)) and not SECRET.search(name) and "\n" not in value
    }
