"""How commands are started on ranks."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trace_dist.config import LaunchConfig
from trace_dist.launching import (
    alone_environment,
    free_port,
    launch_command,
    launch_environment,
    ranks_environment,
)

LAUNCH = Path(__file__).parents[1] / "launch"
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


def test_deepspeed_takes_the_gpus_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own runner takes the first ones, whoever works there, once it is told a number."""

    def gpus(visible: str) -> list[int | str]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        (world,) = (
            word for word in launch_command(LaunchConfig("deepspeed", 2)) if word.startswith("--world_info=")
        )
        return json.loads(base64.urlsafe_b64decode(world.partition("=")[2]))["localhost"]

    assert gpus("4,5") == [0, 1]  # of CPUs
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpus("") == [0, 1]
    assert gpus("4, 5,6") == ["4", "5"]
    assert gpus("MIG-a,GPU-b") == ["MIG-a", "GPU-b"]
    with pytest.raises(ValueError, match=r"^launch.num_ranks=2: CUDA_VISIBLE_DEVICES=7 names 1 for them; "):
        gpus("7")


@pytest.mark.launcher
def test_accelerate_takes_the_gpus_that_are_visible(tmp_path: Path) -> None:
    """Whatever the user's own configuration of it says: one GPU for two ranks is an error to it."""
    (tmp_path / "accelerate").mkdir()
    own = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "gpu_ids": "7"}
    (tmp_path / "accelerate" / "default_config.yaml").write_text(json.dumps(own))
    (tmp_path / "said.py").write_text(
        "import os, pathlib; pathlib.Path(os.environ['RANK']).write_text(os.environ['CUDA_VISIBLE_DEVICES'])"
    )
    seen = {"HF_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        launch_command(LaunchConfig("accelerate", 2), "said"),
        env=launch_environment(num_threads=1) | seen,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["", ""]


@pytest.mark.launcher
def test_what_ends_deepspeeds_launcher_is_no_success(tmp_path: Path) -> None:
    """Its own runner ends with 0 where what it has started is killed."""
    script = "import os, signal, time; os.kill(os.getppid(), signal.SIGKILL); time.sleep(0.1)"
    (tmp_path / "said.py").write_text(script)
    command = launch_command(LaunchConfig("deepspeed", 2), "said")
    paths = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, env=launch_environment(num_threads=1) | {"PYTHONPATH": paths}, cwd=tmp_path, timeout=300
    )
    assert done.returncode != 0


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert launch_environment(1)["OMP_NUM_THREADS"] == str(cores)
    assert launch_environment(10 * cores)["OMP_NUM_THREADS"] == "1"
    assert launch_environment(num_threads=3)["OMP_NUM_THREADS"] == "3"


def test_threads_that_the_user_chose_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert launch_environment(1)["OMP_NUM_THREADS"] == launch_environment(2)["OMP_NUM_THREADS"] == "7"
    assert launch_environment(2, num_threads=1)["OMP_NUM_THREADS"] == "1"
    # A launcher has given its ranks theirs; what one of them starts has the machine to itself.
    assert alone_environment()["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))


def test_cores_that_this_process_may_not_use_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert launch_environment(2)["OMP_NUM_THREADS"] == "3"
    assert alone_environment()["OMP_NUM_THREADS"] == "6"


@pytest.fixture
def login_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen cores and no GPU; nobody has chosen anything."""
    for name in ("OMP_NUM_THREADS", "DS_ACCELERATOR", "SLURM_CPUS_PER_TASK", "SLURM_JOB_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def test_ranks_of_a_host_share_its_cores(
    login_node: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of other hosts take none of them, and find their own accelerators."""
    (tmp_path / "hostfile").write_text(f"{socket.gethostname()} slots=4\nnode-b slots=4\n")
    on_hosts = LaunchConfig("torchrun", 8, str(tmp_path / "hostfile"))
    environment = ranks_environment(on_hosts)
    assert environment["OMP_NUM_THREADS"] == "4"
    assert "DS_ACCELERATOR" not in environment
    assert ranks_environment(on_hosts, together=2)["OMP_NUM_THREADS"] == "2"
    here = ranks_environment(LaunchConfig("torchrun", 8))
    assert (here["OMP_NUM_THREADS"], here["DS_ACCELERATOR"]) == ("2", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    environment = ranks_environment(on_hosts)
    assert (environment["OMP_NUM_THREADS"], environment["DS_ACCELERATOR"]) == ("7", "cuda")


def test_slurm_says_what_a_rank_has(login_node: None, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = LaunchConfig("slurm", 8)
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    environment = ranks_environment(launch)
    assert environment["OMP_NUM_THREADS"] == "4"
    assert "DS_ACCELERATOR" not in environment
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "12")
    assert ranks_environment(launch)["OMP_NUM_THREADS"] == "12"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert ranks_environment(launch)["OMP_NUM_THREADS"] == "7"


def run_script(name: str, folder: Path, *arguments: str, **environment: str) -> str:
    """The command that a script of launch/ runs, after the threads that it gives each rank."""
    for stub in ("torchrun", "accelerate", "deepspeed", "srun", "trace-dist"):
        (folder / stub).write_text('#!/bin/sh\necho "$OMP_NUM_THREADS" "$(basename "$0")" "$@"\n')
    (folder / "nproc").write_text("#!/bin/sh\necho 16\n")
    (folder / "scontrol").write_text("#!/bin/sh\necho node-1\n")
    (folder / "python3").write_text("#!/bin/sh\nexit ${NO_GPU:-1}\n")  # as where torch sees no GPU
    for path in folder.iterdir():
        path.chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment = {**kept, **environment, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", str(LAUNCH / name), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate", "deepspeed"])
def test_scripts_give_each_rank_its_share_of_the_cores(launcher: str, tmp_path: Path) -> None:
    assert run_script(f"{launcher}.sh", tmp_path, "4", "train").startswith(f"4 {launcher} ")
    assert run_script(f"{launcher}.sh", tmp_path, "32", "train").startswith("1 ")
    assert run_script(f"{launcher}.sh", tmp_path, "4", "train", OMP_NUM_THREADS="2").startswith("2 ")


def test_so_does_the_script_of_hosts_that_come_and_go(tmp_path: Path) -> None:
    assert run_script("elastic.sh", tmp_path, "node-1", "4", "train").startswith("4 torchrun ")


def test_the_script_of_deepspeed_takes_the_gpus_that_are_visible(tmp_path: Path) -> None:
    seen = {"CUDA_VISIBLE_DEVICES": "4,5,6", "DS_ACCELERATOR": ""}
    assert " --num_gpus 2 " in run_script("deepspeed.sh", tmp_path, "2", "train", **seen)  # of CPUs
    assert " --include localhost:4,5 " in run_script(
        "deepspeed.sh", tmp_path, "2", "train", **seen, NO_GPU="0"
    )


def test_the_script_of_deepspeed_takes_gpus_by_their_names(tmp_path: Path) -> None:
    """As Kubernetes and MIG give them; DeepSpeed's runner reads each as a number, and ends in a traceback."""
    seen = {"CUDA_VISIBLE_DEVICES": "GPU-8f3a,MIG-11bc", "DS_ACCELERATOR": "", "NO_GPU": "0"}
    asked = "--launch.launcher deepspeed --launch.num_ranks 2"
    assert run_script("deepspeed.sh", tmp_path, "2", "train", **seen).endswith(
        f"trace-dist launch train {asked}\n"
    )
    assert run_script("deepspeed.sh", tmp_path, "2", "run", **seen).endswith(f"trace-dist run {asked}\n")


def test_a_free_port_can_be_taken() -> None:
    assert 0 < free_port() < 65536
