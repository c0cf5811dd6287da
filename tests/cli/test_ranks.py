"""Commands on ranks that mpirun, srun or a user started: joined, or refused, but never each a run of its own."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from cli.program import environment, files, make_config, write_config, write_tasks
from launching import free_port, python

from trace_dist import Delta
from trace_dist.masks import Mask, UnitLayout
from trace_dist.utils.locks import hold

pytestmark = pytest.mark.launcher
Environment = dict[str, str]


SBATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
"""What the shell of a job of two tasks carries. What it starts by itself is one process."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration for two ranks of ZeRO-3; the target is there, made in the shell of a job."""
    root = tmp_path_factory.mktemp("ranks")
    write_tasks(root)
    config = make_config(root) | {"backend": "zero3", "launch": {"launcher": "deepspeed", "num_ranks": 2}}
    write_config(root, config)
    ((code, _),) = start(root, lambda rank: SBATCH, [[]], ["base", "--which", "target"])
    assert code == 0
    name, units = "model.layers.0.mlp.up_proj.weight", torch.arange(48, dtype=torch.int32)
    Mask({name: units}, {name: UnitLayout((48, 32), 32)}, "row").save(root / "mask.safetensors")
    return root


def openmpi(rank: int) -> Environment:
    names = {"RANK": rank, "LOCAL_RANK": rank, "SIZE": 2, "LOCAL_SIZE": 2}
    return {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in names.items()}


def start(
    root: Path,
    launcher: Callable[[int], Environment],
    options: Sequence[Sequence[str]],
    command: Sequence[str] = ("train", "--mask_file", "mask.safetensors"),
) -> list[tuple[int, str]]:
    """Exit code and error lines of each rank, each with options of its own; fails when one hangs."""
    shared = environment(root / "cache") | {"MASTER_PORT": str(free_port())}
    command = [python(), "-m", "trace_dist", *command, "--config", "config.yaml"]
    ranks = [
        subprocess.Popen(
            [*command, *own], env=shared | launcher(rank), stderr=subprocess.PIPE, text=True, cwd=root
        )
        for rank, own in enumerate(options)
    ]
    try:
        outputs = [rank.communicate(timeout=200)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert not any("Traceback" in output for output in outputs), outputs
    errors = ["\n".join(line for line in output.splitlines() if "error" in line) for output in outputs]
    return [(rank.returncode, error) for rank, error in zip(ranks, errors, strict=True)]


def test_ranks_of_mpirun_train_together(root: Path) -> None:
    codes = [code for code, _ in start(root, openmpi, [[], []])]
    assert codes == [0, 0]
    assert (root / "run" / "deltas" / "copy.safetensors").is_file()
    assert not (root / "run" / ".lock").exists()


def test_ranks_that_share_rows_train_the_same_delta(root: Path) -> None:
    """Rounding apart; a step moves an entry by up to 3e-3."""
    options = ["--run_dir", "shared", "--train.sequence_parallel", "2"]
    assert [code for code, _ in start(root, openmpi, [options, options])] == [0, 0]
    ours, alone = (Delta.load(root / run / "deltas" / "copy.safetensors") for run in ("shared", "run"))
    assert ours.mask == alone.mask
    for name, values in alone.values.items():
        torch.testing.assert_close(ours.values[name], values, rtol=0, atol=3e-5)


def test_ranks_that_cannot_share_rows(root: Path) -> None:
    options = ["--train.sequence_parallel", "2", "--launch.num_ranks", "1"]
    ((code, error),) = start(root, lambda rank: {}, [options])
    assert code == 2
    assert error.startswith(
        "error: train.sequence_parallel=2: must divide the number of ranks, and train works on 1; start it with a launcher"
    )
    options = ["--train.sequence_parallel", "4", "--launch.num_ranks", "4"]
    ((code, error),) = start(root, lambda rank: {}, [options], ["run"])
    assert code == 2
    assert error.startswith("error: train.sequence_parallel=4: must divide the model's 2 attention heads")


def test_ranks_that_differ_are_refused_on_all(root: Path) -> None:
    before = files(root / "run")
    other = ["--train.lr", "0.5", "--train.steps", "9", "--task_name", "twist"]
    found = [
        "task_name: rank 0 has None, rank 1 has twist",
        "train.steps: rank 0 has 4, rank 1 has 9",
        "train.lr: rank 0 has 0.003, rank 1 has 0.5",
    ]
    for rank, (code, error) in enumerate(start(root, openmpi, [[], other])):
        assert code == 2
        assert error.startswith(
            f"error{' [rank 1]' * rank}: {'; '.join(found)}: the ranks differ; start every rank"
        )
    assert files(root / "run") == before


def test_a_folder_that_is_held_is_refused_on_all(root: Path) -> None:
    with hold(root / "run" / ".lock", "run_dir='x'"):
        for code, error in start(root, openmpi, [[], []]):
            assert code == 2
            assert "is at work in it; wait for it, end it, or choose another run_dir" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "launch.num_ranks=2: train was started on 1; start it with a launcher"),
        (["--launch.num_ranks", "1"], "SLURM_NTASKS=2: train was started as one process, not by srun"),
    ],
)
def test_fewer_ranks_than_asked_for(options: list[str], message: str, root: Path) -> None:
    before = files(root / "run")
    ((code, error),) = start(root, lambda rank: SBATCH, [options])
    assert code == 2
    assert error.startswith(f"error: {message}")
    assert files(root / "run") == before
