"""Ranks as launchers describe them: read under their own names, handed on under torch's, or refused by name."""

from __future__ import annotations

import os

import pytest

from trace_dist.utils.launch import adopt_launch, job_size, launched_rank

FAMILIES = (
    "OMPI_",
    "MV2_",
    "PMI",
    "MPI_",
    "PALS_",
    "SLURM_",
    "JSM_",
    "FLUX_",
    "TORCHELASTIC_",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_",
)
Environment = dict[str, object]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any launcher's variables; whatever a test adds is gone afterwards."""
    for name in list(os.environ):
        if name.startswith(FAMILIES):
            monkeypatch.delenv(name)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def set_all(monkeypatch: pytest.MonkeyPatch, variables: Environment) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def launcher(prefix: str, rank: int, size: int, on_this_machine: int) -> Environment:
    names = {"RANK": rank, "SIZE": size, "LOCAL_RANK": rank % on_this_machine, "LOCAL_SIZE": on_this_machine}
    return {f"{prefix}_COMM_WORLD_{name}": value for name, value in names.items()}


def srun(rank: int, size: int, machines: int) -> Environment:
    job = {"SLURM_JOB_ID": 7, "SLURM_NTASKS": size, "SLURM_PROCID": rank, "SLURM_STEP_ID": 0}
    step = {"SLURM_STEP_NUM_TASKS": size, "SLURM_STEP_NUM_NODES": machines}
    return {**job, **step, "SLURM_LOCALID": rank % (size // machines)}


def hydra(rank: int, size: int) -> Environment:
    return {"PMI_RANK": rank, "PMI_SIZE": size, "MPI_LOCALRANKID": rank, "MPI_LOCALNRANKS": size}


def jsrun(rank: int, size: int) -> Environment:
    names = {"RANK": rank, "SIZE": size, "LOCAL_RANK": rank, "LOCAL_SIZE": size}
    return {f"JSM_NAMESPACE_{name}": value for name, value in names.items()} | {"PMIX_RANK": rank}


PLACE: Environment = {"MASTER_ADDR": "node-1", "MASTER_PORT": 1234}
AGENT: Environment = {"TORCHELASTIC_RUN_ID": "a", **PLACE}


@pytest.mark.parametrize(
    ("variables", "rank", "size", "local_rank", "address"),
    [
        (launcher("OMPI", 1, 2, 2), 1, 2, 1, "127.0.0.1"),
        (launcher("OMPI", 5, 8, 4) | PLACE, 5, 8, 1, "node-1"),
        (launcher("MV2", 3, 4, 4), 3, 4, 3, "127.0.0.1"),
        (hydra(1, 3), 1, 3, 1, "127.0.0.1"),
        (srun(1, 2, 1), 1, 2, 1, "127.0.0.1"),
        (srun(9, 16, 2) | PLACE, 9, 16, 1, "node-1"),
        (srun(1, 2, 2) | launcher("OMPI", 5, 8, 4) | PLACE, 5, 8, 1, "node-1"),
        (jsrun(1, 2), 1, 2, 1, "127.0.0.1"),
        ({"FLUX_TASK_RANK": 1, "FLUX_JOB_SIZE": 2, "FLUX_TASK_LOCAL_ID": 1, "FLUX_JOB_NNODES": 1}, 1, 2, 1, "127.0.0.1"),
        (launcher("OMPI", 1, 2, 1) | AGENT | {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0}, 0, 2, 0, "node-1"),
        ({"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1} | PLACE, 3, 4, 1, "node-1"),
        (srun(1, 2, 2) | {"RANK": 8, "WORLD_SIZE": 16, "LOCAL_RANK": 0} | PLACE, 8, 16, 0, "node-1"),
    ],
    ids=["openmpi", "openmpi-nodes", "mvapich", "pmi", "srun", "srun-nodes", "in-step", "jsrun", "flux", "agents", "torch",
         "srun-torch"],
)  # fmt: skip
def test_a_launcher_is_read(
    variables: Environment, rank: int, size: int, local_rank: int, address: str, monkeypatch
) -> None:
    set_all(monkeypatch, variables)
    assert launched_rank() == rank
    assert adopt_launch() == size
    found = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    assert found == {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(local_rank),
        "MASTER_ADDR": address,
    }
    assert adopt_launch() == size


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_JOB_ID": 7, "SLURM_NTASKS": 8},
        {"SLURM_JOB_ID": 7, "SLURM_NTASKS": 8, "SLURM_PROCID": 0, "SLURM_LOCALID": 0},
        srun(0, 1, 1),
        launcher("OMPI", 0, 1, 1),
        hydra(0, 1),
    ],
    ids=["plain", "salloc", "sbatch", "srun-1", "openmpi-1", "pmi-1"],
)
def test_one_process_stays_one(variables: Environment, monkeypatch) -> None:
    set_all(monkeypatch, variables)
    assert adopt_launch() == 1
    assert launched_rank() == 0
    assert "RANK" not in os.environ


def test_tasks_of_a_job_are_known_to_its_shell_alone(monkeypatch) -> None:
    assert job_size() == 1
    set_all(monkeypatch, {"SLURM_NTASKS": 8, "SLURM_PROCID": 0})
    assert job_size() == 8
    set_all(monkeypatch, {"SLURM_STEP_ID": 0, "SLURM_STEP_NUM_TASKS": 1})
    assert job_size() == 1


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (launcher("OMPI", 5, 8, 4), r"^OMPI_COMM_WORLD_SIZE=8: mpirun names no place .*; set MASTER_ADDR"),
        (srun(9, 16, 2), r"^SLURM_STEP_NUM_TASKS=16: srun names no place .*; set MASTER_ADDR"),
        ({"PMI_RANK": 1, "PMI_SIZE": 2}, r"^PMI_RANK=1: mpiexec started .* MPI_LOCALRANKID is not set; set RANK"),
        ({"PMIX_RANK": 1}, r"^PMIX_RANK=1: a PMIx launcher started .* PMIX_SIZE is not set; set RANK"),
        ({"PALS_RANKID": 0}, r"^PALS_RANKID=0: PALS started .*; set RANK"),
        ({"SLURM_PROCID": 1, "SLURM_NTASKS": 2}, r"^SLURM_PROCID=1: srun started .* SLURM_STEP_NUM_TASKS is not"),
        ({"RANK": 1}, r"^RANK=1: WORLD_SIZE is not set; start with torchrun"),
        ({"WORLD_SIZE": 2}, r"^WORLD_SIZE=2: RANK is not set; start with torchrun"),
        ({"RANK": 2, "WORLD_SIZE": 2}, r"^RANK=2: must be below WORLD_SIZE=2"),
        ({"RANK": 0, "WORLD_SIZE": 2}, r"^WORLD_SIZE=2: MASTER_ADDR is not set; set it"),
        ({"RANK": "x", "WORLD_SIZE": 2}, r"^RANK='x': must be a number"),
        ({"RANK": 0, "WORLD_SIZE": "9" * 5000}, r"^WORLD_SIZE='9{60,80}: must be a number"),
        ({"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": "x"}, r"^LOCAL_RANK='x': must be a number"),
        ({"RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": "ssh"}, r"^MASTER_PORT='ssh': must be a number"),
        (srun(1, 2, 1) | {"SLURM_LOCALID": "one"}, r"^SLURM_LOCALID='one': must be a number"),
        (
            launcher("OMPI", 1, 2, 2) | {"RANK": 0, "WORLD_SIZE": 1},
            r"^OMPI_COMM_WORLD_SIZE=2: mpirun started 2 processes, but WORLD_SIZE=1 .*; unset RANK",
        ),
        (
            launcher("OMPI", 1, 2, 2) | {"RANK": 0, "WORLD_SIZE": 2} | PLACE,
            r"^RANK=0: mpirun says OMPI_COMM_WORLD_RANK=1; .*unset RANK",
        ),
        ({"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": "x"} | PLACE, r"^LOCAL_RANK='x': must be a number"),
        ({"FLUX_TASK_RANK": 1, "FLUX_JOB_SIZE": 2}, r"^FLUX_TASK_RANK=1: flux run started .* FLUX_TASK_LOCAL_ID is not set"),
        (
            srun(1, 2, 1) | {"RANK": 0, "WORLD_SIZE": 1},
            r"^SLURM_STEP_NUM_TASKS=2: srun started 2 processes, but WORLD_SIZE=1",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(variables: Environment, message: str, monkeypatch) -> None:
    set_all(monkeypatch, variables)
    with pytest.raises(ValueError, match=message):
        adopt_launch()
