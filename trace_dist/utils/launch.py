"""What started this process, and how many ranks it asked for.

torchrun, deepspeed and accelerate say it in RANK, LOCAL_RANK and WORLD_SIZE. The launchers of MPI and of Slurm have names of
their own. They are read here and handed on under torch's names, for torch, DeepSpeed and our own code alike.

[Note: Slurm] A shell inside ``salloc`` or ``sbatch`` carries SLURM_NTASKS and SLURM_PROCID=0 of the whole job, and yet it is one
process. Only ``srun`` makes a step: its processes have SLURM_STEP_ID, and SLURM_STEP_NUM_TASKS counts them.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

DEFAULT_PORT = "29500"
"""torch's own, where nobody names another."""
LONGEST_NUMBER = 9
"""Digits of a number of ranks or a port."""


@dataclass(frozen=True)
class Launcher:
    """Names of a launcher's environment variables.

    Attributes:
        name: for messages.
        rank, size: of this process among all. A launcher that states no size is refused.
        local_rank: of this process on its machine.
        one_machine: (variable, variable or number that it equals) where all ranks share a machine.
    """

    name: str
    rank: str
    size: str
    local_rank: str
    one_machine: tuple[str, str]

    @property
    def started_us(self) -> bool:
        """Whether this process is one of its ranks."""
        return self.rank in os.environ and (self.name != "srun" or _is_step())

    @property
    def is_local(self) -> bool:
        """Whether all ranks are known to run on this machine."""
        left, right = self.one_machine
        value = os.environ.get(left)
        return value is not None and value == os.environ.get(right, right)


MPI = "OMPI_COMM_WORLD"
MVAPICH = "MV2_COMM_WORLD"
LAUNCHERS = (
    Launcher(
        "mpirun", f"{MPI}_RANK", f"{MPI}_SIZE", f"{MPI}_LOCAL_RANK", (f"{MPI}_LOCAL_SIZE", f"{MPI}_SIZE")
    ),
    Launcher(
        "mpirun_rsh",
        f"{MVAPICH}_RANK",
        f"{MVAPICH}_SIZE",
        f"{MVAPICH}_LOCAL_RANK",
        (f"{MVAPICH}_LOCAL_SIZE", f"{MVAPICH}_SIZE"),
    ),
    Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ("SLURM_STEP_NUM_NODES", "1")),
    Launcher("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", ("MPI_LOCALNRANKS", "PMI_SIZE")),
    Launcher(
        "jsrun",
        "JSM_NAMESPACE_RANK",
        "JSM_NAMESPACE_SIZE",
        "JSM_NAMESPACE_LOCAL_RANK",
        ("JSM_NAMESPACE_LOCAL_SIZE", "JSM_NAMESPACE_SIZE"),
    ),
    Launcher("flux run", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", ("FLUX_JOB_NNODES", "1")),
    Launcher(
        "a PMIx launcher", "PMIX_RANK", "PMIX_SIZE", "PMIX_LOCAL_RANK", ("PMIX_LOCAL_SIZE", "PMIX_SIZE")
    ),
    Launcher("PALS", "PALS_RANKID", "PALS_SIZE", "PALS_LOCAL_RANKID", ("PALS_LOCAL_SIZE", "PALS_SIZE")),
)
"""The first that started us decides: MPI's may run inside a step of Slurm."""


def _is_step() -> bool:
    """[Note: Slurm]; a shell of a job is its process 0, so another one is of a step whatever the variables say."""
    return "SLURM_STEP_ID" in os.environ or os.environ.get("SLURM_PROCID", "0") != "0"


def launched_rank() -> int:
    """This process's rank for messages, whatever started it; 0 where nothing says one."""
    names = ["RANK", *(launcher.rank for launcher in LAUNCHERS if launcher.started_us)]
    value = next((os.environ[name] for name in names if name in os.environ), "0")
    return int(value) if value.isdecimal() and len(value) <= LONGEST_NUMBER else 0


def is_launched() -> bool:
    """Whether a launcher started this process as a rank."""
    return "RANK" in os.environ or any(launcher.started_us for launcher in LAUNCHERS)


def is_spread() -> bool:
    """Whether the launcher that started this process says that its ranks are on several machines."""
    launcher = next((each for each in LAUNCHERS if each.started_us), None)
    return launcher is not None and launcher.one_machine[0] in os.environ and not launcher.is_local


def adopt_launch() -> int:
    """Hand a foreign launcher's variables on under torch's names.

    Returns:
        Number of ranks that were started; 1 in a plain process.

    Raises:
        ValueError: what is said is not enough, or contradicts itself.
    """
    launcher = next((each for each in LAUNCHERS if each.started_us), None)
    names = ("LOCAL_RANK", "MASTER_PORT", *([] if launcher is None else [launcher.local_rank]))
    for name in (name for name in names if name in os.environ):
        _number(name)
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return _torch_size(launcher)
    if launcher is None:
        return 1
    _require(launcher, launcher.size)
    rank, size = _number(launcher.rank), _number(launcher.size)
    _check_rank(launcher.rank, rank, launcher.size, size)
    if size == 1:
        return 1
    if launcher.local_rank not in os.environ and not launcher.is_local:
        _require(launcher, launcher.local_rank)
    if "MASTER_ADDR" not in os.environ and not launcher.is_local:
        raise ValueError(
            f"{launcher.size}={size}: {launcher.name} names no place where the ranks meet; set MASTER_ADDR to the host name "
            "of rank 0's machine and MASTER_PORT to a free port there, the same on every rank"
        )
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", DEFAULT_PORT)
    local_rank = os.environ.get(launcher.local_rank, str(rank))
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": local_rank}
    return size


def job_size() -> int:
    """Number of tasks that the Slurm job around this shell asked for; 1 outside one and in a step."""
    in_shell = "SLURM_NTASKS" in os.environ and not _is_step()
    return _number("SLURM_NTASKS") if in_shell else 1


def _torch_size(launcher: Launcher | None) -> int:
    """The number of ranks that torch's own variables state."""
    missing = [name for name in ("RANK", "WORLD_SIZE") if name not in os.environ]
    if missing:
        given = ({"RANK", "WORLD_SIZE"} - set(missing)).pop()
        raise ValueError(
            f"{given}={os.environ[given]}: {missing[0]} is not set; start with torchrun, deepspeed, accelerate, mpirun or "
            f"srun, or unset {given} for one process"
        )
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    _check_rank("RANK", rank, "WORLD_SIZE", size)
    if size > 1 and "MASTER_ADDR" not in os.environ:
        raise ValueError(
            f"WORLD_SIZE={size}: MASTER_ADDR is not set; set it to the host name of rank 0's machine, and MASTER_PORT"
        )
    if "LOCAL_RANK" in os.environ:
        _number("LOCAL_RANK")
    asked = _number(launcher.size) if launcher is not None and launcher.size in os.environ else 1
    if size < asked and launcher is not None:
        raise ValueError(
            f"{launcher.size}={asked}: {launcher.name} started {asked} processes, but WORLD_SIZE={size} makes each of them a "
            f"job of its own; unset RANK and WORLD_SIZE to join them, or {launcher.rank} to keep them apart"
        )
    # torchrun gives ranks of its own to what mpirun has started on each machine.
    alone = launcher is None or asked == 1 or "TORCHELASTIC_RUN_ID" in os.environ
    if launcher is not None and not alone and size == asked and _number(launcher.rank) != rank:
        raise ValueError(
            f"RANK={rank}: {launcher.name} says {launcher.rank}={os.environ[launcher.rank]}; perhaps RANK was set in the shell "
            "for all processes: unset RANK, LOCAL_RANK and WORLD_SIZE"
        )
    return size


def _require(launcher: Launcher, name: str) -> None:
    if name not in os.environ:
        raise ValueError(
            f"{launcher.rank}={os.environ[launcher.rank]}: {launcher.name} started this process as one of several, but {name} "
            "is not set; set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or start with torchrun or deepspeed"
        )


def _number(name: str) -> int:
    value = os.environ[name]
    if not (value.isdecimal() and len(value) <= LONGEST_NUMBER):
        raise ValueError(
            f"{name}={value!r:.80}: must be a number; start with a launcher that sets it, or unset it"
        )
    return int(value)


def _check_rank(rank_name: str, rank: int, size_name: str, size: int) -> None:
    if rank >= size:
        raise ValueError(
            f"{rank_name}={rank}: must be below {size_name}={size}; start all ranks with the same launcher"
        )


def process_name(pid: int, host: str | None = None) -> str:
    """How a process is named in a lock file; of this machine where no host is given."""
    return f"process {pid} on {host or socket.gethostname()}"
