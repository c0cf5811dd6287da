"""Jobs on two hosts: the losses are those of one host to the digit, and a host that is lost is named. Hosts are namespaces."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli.program import make_config, processes_with, write_config, write_tasks
from hosts import namespaces
from hosts.namespaces import Hosts
from launching import free_port, python

from trace_dist.cli.main import main
from trace_dist.masks import Mask, UnitLayout

pytestmark = pytest.mark.launcher
ROOT = Path(__file__).parents[2]
STEPS = 40
TIMEOUT = 500
ON_HOSTS = ("--launch.num_ranks", 2, "--launch.hostfile")


@pytest.fixture(scope="module")
def two() -> Iterator[Hosts]:
    reason = namespaces.forbidden()
    if reason is not None:
        pytest.skip(reason)
    with namespaces.hosts(2) as found:
        yield found


def environment(**changes: str) -> dict[str, str]:
    tests = ROOT / "tests"
    paths = (ROOT, ROOT / "kernels", tests, tests / "cli", os.environ.get("PYTHONPATH"))
    own = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    own["PYTHONPATH"] = os.pathsep.join(map(str, filter(None, paths)))
    own["PATH"] = f"{Path(python()).parent}:{namespaces.environment()['PATH']}"
    return namespaces.environment() | own | changes


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration, a mask, and the base, which one process makes."""
    root = tmp_path_factory.mktemp("hosts")
    write_tasks(root)
    config = make_config(root) | {"backend": "fsdp2"}
    config["tasks"], config["bank"]["layer"] = config["tasks"][:1], 0
    config["train"] |= {"steps": STEPS, "log_every": 1, "checkpoint_every": 5}
    config["launch"] = {"launcher": "torchrun", "num_ranks": 2, "silence_seconds": 5}
    write_config(root, config)
    name, units = "model.layers.0.mlp.up_proj.weight", torch.arange(48, dtype=torch.int32)
    Mask({name: units}, {name: UnitLayout((48, 32), 32)}, "row").save(root / "mask.safetensors")
    alone = ["--backend", "single", "--launch.launcher", "none", "--launch.num_ranks", "1"]
    assert main(["base", "--config", str(root / "config.yaml"), "--which", "target", *alone]) == 0
    return root


def run(root: Path, command: list[str], timeout: float = TIMEOUT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=root, env=environment(), capture_output=True, text=True, timeout=timeout
    )


def learn(root: Path, name: str) -> list[object]:
    """The arguments of a learning with files of its own; the base is shared."""
    config = yaml.safe_load((root / "config.yaml").read_text()) | {"run_dir": str(root / name)}
    config["bank"] |= {"path": str(root / name / "bank")}
    write_config(root, config, f"{name}.yaml")
    return ["learn", "--config", f"{name}.yaml", "--mask_file", "mask.safetensors"]


def curve(root: Path, name: str) -> list[tuple[int, float, float]]:
    lines = map(json.loads, (root / name / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def on(hosts: Hosts, root: Path, host: int, *command: object) -> list[str]:
    """A command on a host, in the folder of the test."""
    words = hosts.on(host, *command)
    return [f"--wd={root}" if word.startswith("--wd=") else word for word in words]


@pytest.fixture(scope="module")
def one_host(work: Path) -> list[tuple[int, float, float]]:
    """Losses of two ranks on one host."""
    start = [
        python(),
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    start += ["-m", "trace_dist"]
    done = run(work, [*start, *map(str, learn(work, "one"))])
    assert done.returncode == 0, done.stderr[-3000:]
    found = curve(work, "one")
    assert [step for step, _, _ in found] == list(range(1, STEPS + 1))
    return found


def test_the_pipeline_on_two_hosts_over_pdsh(two: Hosts, work: Path, one_host: Any) -> None:
    """PATH is told, the interface is found though each host takes its own name for 127.0.1.1."""
    options = [*ON_HOSTS, two.hostfile, "--launch.launcher", "deepspeed"]
    done = run(work, on(two, work, 1, "python", "-m", "trace_dist", *learn(work, "pdsh"), *options))
    log = (work / "pdsh" / "logs" / "learn.log").read_text() if (work / "pdsh" / "logs").is_dir() else ""
    assert done.returncode == 0, done.stderr[-2000:] + log[-3000:]
    assert curve(work, "pdsh") == one_host
    deltas = [work / name / "bank" / "tasks" / "copy" / "delta.safetensors" for name in ("one", "pdsh")]
    assert deltas[0].read_bytes() == deltas[1].read_bytes()


def test_torchrun_over_c10d_and_a_host_that_is_lost(two: Hosts, work: Path, one_host: Any) -> None:
    """The elastic script: until a host is lost its losses are those of one host, and then the other goes on from a checkpoint."""
    words = ["node-1", 1, "train", *learn(work, "elastic")[1:]]
    ranks = [
        subprocess.Popen(
            on(two, work, host, "bash", ROOT / "launch" / "elastic.sh", *words),
            env=environment(NNODES="1:2"),
            cwd=work,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in (1, 2)
    ]
    metrics = work / "elastic" / "metrics.jsonl"
    try:
        await_line(metrics, 12, ranks[0])
        mine = [pid for pid in pids_on(two, 2) if pid in processes_with("elastic.yaml")]
        for pid in mine:
            os.kill(pid, signal.SIGKILL)
        said = ranks[0].communicate(timeout=150)[1]
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    assert ranks[0].returncode == 0, said[-3000:]
    found = curve(work, "elastic")
    assert found[:12] == one_host[:12]
    assert "copy: continuing after step " in said
    last = {step: (loss, norm) for step, loss, norm in found}
    assert list(last) == list(range(1, STEPS + 1))
    for step, loss, norm in one_host:
        assert last[step] == pytest.approx((loss, norm), rel=1e-3)


def pids_on(two: Hosts, host: int) -> set[int]:
    """Processes in a host's network."""
    said = subprocess.run(
        ["ip", "netns", "pids", two.names[host]], capture_output=True, text=True, env=environment()
    )
    return set(map(int, said.stdout.split()))


def await_line(path: Path, lines: int, process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.is_file() or path.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_link_that_is_down_for_good(two: Hosts, tmp_path: Path) -> None:
    """Named within seconds, the command ends as one that can be started again, and nothing is left on either host."""
    settings = {"launcher": "torchrun", "num_ranks": 2, "hostfile": str(two.hostfile), "silence_seconds": 5}
    command = on(two, tmp_path, 1, "python", "-m", "trace_dist.launching.supervisor", json.dumps(settings))
    job = subprocess.Popen(
        [*command, "living", str(tmp_path), "apart"],
        env=environment(), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("pid-*"))) < 2 and time.monotonic() < deadline and job.poll() is None:
            time.sleep(0.05)
        time.sleep(2)
        two.link(2, up=False)
        cut = time.monotonic()
        said = job.communicate(timeout=60)[1]
        seconds = time.monotonic() - cut
    finally:
        two.link(2, up=True)
        job.kill()
        job.communicate()
    assert "error: lost contact: rank 1 on node-2 has given no sign of life for 3 s" in said, said[-2000:]
    assert "it was in train: copy step " in said
    assert job.returncode == 75
    assert seconds < 30
    for rank in range(2):  # a run folder that the hosts do not share would have been refused
        assert (
            (tmp_path / f"apart-{rank}")
            .read_text()
            .startswith(
                "run_dir='r': node-2 cannot see what rank 0 on node-1 writes there; put it on a file system that all hosts share"
            )
        )
    deadline = time.monotonic() + 20
    while processes_with(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_with(str(tmp_path)) == []


def test_what_a_dry_run_finds(two: Hosts, work: Path) -> None:
    """Commands, a line per host; a mask that another host does not have alike, and a port that is closed, are named."""
    command = [
        "python",
        "-m",
        "trace_dist",
        "launch",
        "--dry_run",
        "true",
        "train",
        "--config",
        "config.yaml",
    ]
    options = [*ON_HOSTS, str(two.hostfile), "--mask_file", "/dev/shm/mask.safetensors"]
    mask = (work / "mask.safetensors").read_bytes()
    for host, content in ((1, mask), (2, mask + b"x")):
        subprocess.run(
            on(two, work, host, "tee", "/dev/shm/mask.safetensors"), input=content, stdout=subprocess.DEVNULL
        )
    done = run(work, on(two, work, 1, *command, *options))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "node-2: ssh -oBatchMode=yes" in done.stdout
    assert "--node_rank 1 --nproc_per_node 1 --master_addr node-1" in done.stdout
    assert "node-2: slots 1; eth0 10.77.0.2; python 3." in done.stdout
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error"))
    assert error.startswith("error: the hosts are not ready: /dev/shm/mask.safetensors differs: ")


def test_a_host_that_does_not_answer(two: Hosts, work: Path) -> None:
    from trace_dist.launching import checks
    from trace_dist.launching.hosts import Host

    found = checks.check_hosts(
        [Host("localhost", 1), Host("no-such-host.invalid", 1)], str(work), [], environment()
    )
    assert [line.partition(":")[0] for line in found.lines] == ["localhost"]
    assert any(
        "`ssh no-such-host.invalid true` must work without a question" in problem
        for problem in found.problems
    )
