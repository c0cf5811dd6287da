"""What is started on which host, and what other hosts are told."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner

from trace_dist.cli import main
from trace_dist.config import LaunchConfig
from trace_dist.launching import checks, host_facts, launch_command, shown_launch
from trace_dist.launching.commands import first_node, starts
from trace_dist.launching.environment import forwarded
from trace_dist.launching.hosts import Host, hosts_of, read_hostfile
from trace_dist.optim import part_server
from trace_dist.utils import network

HERE = socket.gethostname()


@pytest.fixture
def hostfile(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        (tmp_path / "hosts").write_text(text)
        return str(tmp_path / "hosts")

    return write


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "it names no host"),
        ("# none\n\n", "it names no host"),
        ("node-1 slots=2\nnode-2\n", "line 2 is 'node-2'; write `NAME slots=RANKS`"),
        ("node-1 slots=0", "line 1 is 'node-1 slots=0'"),
        ("-oProxyCommand=x slots=1", "line 1 is '-oProxyCommand=x slots=1'"),
        ("a slots=1\na slots=2", "a is there twice"),
        (f"a slots={'9' * 5000}", "line 1 is 'a slots=9"),
    ],
)
def test_hostfiles_that_make_no_sense(text: str, complaint: str, hostfile: Callable[[str], str]) -> None:
    path = hostfile(text)
    with pytest.raises(ValueError, match=r"^launch\.hostfile='.*hosts': ") as refused:
        read_hostfile(path)
    assert complaint in str(refused.value)


def test_a_hostfile(hostfile: Callable[[str], str]) -> None:
    path = hostfile("# both\nnode-1 slots=8 # the first\n\n10.0.0.2  slots=16\n")
    assert read_hostfile(path) == [Host("node-1", 8), Host("10.0.0.2", 16)]
    with pytest.raises(ValueError, match=r"hosts.not_there': cannot be read"):
        read_hostfile(path + ".not_there")


@pytest.mark.parametrize(
    ("text", "launcher", "ranks", "complaint"),
    [
        (
            f"{HERE} slots=2\nb slots=2",
            "torchrun",
            2,
            "launch.num_ranks=2: .* has 4 slots; set --launch.num_ranks 4",
        ),
        (f"b.invalid slots=1\n{HERE} slots=1", "torchrun", 2, "its first host is b.invalid, and this is"),
        (
            "localhost slots=1\nb slots=1",
            "torchrun",
            2,
            "its first host is localhost, by which every other host",
        ),
        (
            "127.0.0.1 slots=1\nb slots=1",
            "deepspeed",
            2,
            "is 127.0.0.1, .*; give the name by which they reach",
        ),
        (f"{HERE} slots=1\nb slots=2", "accelerate", 3, "accelerate starts as many ranks on every host"),
    ],
)
def test_hosts_that_do_not_fit(
    text: str, launcher: str, ranks: int, complaint: str, hostfile: Callable[[str], str]
) -> None:
    with pytest.raises(ValueError, match=complaint):
        hosts_of(LaunchConfig(launcher, ranks, hostfile(text)))


def test_a_hostfile_with_this_machine_alone_is_no_job_of_several(hostfile: Callable[[str], str]) -> None:
    launch = LaunchConfig("torchrun", 2, hostfile(f"{HERE} slots=2"))
    assert hosts_of(launch) == []
    assert launch_command(launch)[:3][-1] == "torch.distributed.run"
    assert shown_launch(launch) == "trace-dist launch"


def test_torchrun_and_accelerate_on_each_host(hostfile: Callable[[str], str], tmp_path: Path) -> None:
    """Rank 0 is here; what is told to the other one is its whole environment, and nothing secret."""
    path = hostfile(f"{HERE} slots=2\nnode-b slots=2")
    told = {"PATH": "/env/bin", "PYTHONPATH": "/a b", "HF_TOKEN": "secret", "HOME": "/root", "RANK": "3"}
    for launcher, words in (
        ("torchrun", f"--nnodes 2 --node_rank 1 --nproc_per_node 2 --master_addr {HERE}"),
        ("accelerate", f"--num_machines 2 --machine_rank 1 --main_process_ip {HERE}"),
    ):
        here, there = starts(
            LaunchConfig(launcher, 4, path), "trace_dist", ["train", "--a", "x y"], told, tmp_path
        )
        assert (here.host, there.host) == (None, "node-b")
        assert here.command[-4:] == ["trace_dist", "train", "--a", "x y"]
        assert there.command[0] == "ssh"
        assert there.command[-2] == "node-b"
        text = there.command[-1]
        assert text.startswith(f"cd {os.getcwd()} && exec env PATH=/env/bin 'PYTHONPATH=/a b' ")
        assert words in text
        assert text.endswith("trace_dist train --a 'x y'")
        assert "secret" not in text
        assert "RANK=3" not in text


def test_deepspeed_over_pdsh(hostfile: Callable[[str], str], tmp_path: Path) -> None:
    launch = LaunchConfig("deepspeed", 2, hostfile(f"{HERE} slots=1\nnode-b slots=1"))
    with pytest.raises(
        ValueError,
        match=r"pdsh, which is not installed here; install pdsh, or set launch.launcher to torchrun",
    ):
        starts(launch, "trace_dist", [], {"PATH": "/nowhere"}, tmp_path)
    told = {"PATH": pdsh(tmp_path), "DS_ACCELERATOR": "cpu"}
    (start,) = starts(launch, "trace_dist", ["train", "--methods", "[a]", "--x", "100%"], told, tmp_path)
    # Its shells get the words as they are, and pdsh a percent sign as two.
    assert start.command[-5:] == ["train", "--methods", "'[a]'", "--x", "100%%"]
    lines = Path(start.environment["DS_ENV_FILE"]).read_text().splitlines()
    assert {f"PATH={tmp_path}", "DS_ACCELERATOR=cpu"} <= set(lines)


def pdsh(folder: Path) -> str:
    """A folder with a program of this name."""
    (folder / "pdsh").write_text("#!/bin/sh\n")
    (folder / "pdsh").chmod(0o755)
    return str(folder)


def test_the_shells_of_pdsh_get_what_was_typed(hostfile: Callable[[str], str], tmp_path: Path) -> None:
    """Words and variables pass through DeepSpeed, pdsh and a shell, where ``$(...)`` would be run."""
    launch = LaunchConfig("deepspeed", 2, hostfile(f"{HERE} slots=1\nnode-b slots=1"))
    words = ["train", "a $HOME b", "`id` x", 'say "\\" $(id)', "it's 100%", "\\ \\n", "$HOME", "", "a\nb"]
    told = {"HF_HOME": '/a "b" $(id) `id` \\ 5%h', "OMP_X": "$HOME", "PATH": pdsh(tmp_path)}
    (start,) = starts(launch, "trace_dist", words, told, tmp_path)
    runner = PDSHRunner(SimpleNamespace(user_args=start.command[-len(words) :], user_script=""), "")
    for line in Path(start.environment["DS_ENV_FILE"]).read_text().splitlines():
        runner.add_export(*line.split("=", maxsplit=1))
    exports = "".join(f"export {name}={value}; " for name, value in runner.exports.items() if name != "PATH")
    show = (
        "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['HF_HOME'], os.environ['OMP_X']]))"
    )
    line = f"{exports} {sys.executable} -c {shlex.quote(show)} {' '.join(runner.user_arguments)}"
    said = subprocess.run(["sh", "-c", line.replace("%%", "%")], capture_output=True, text=True, check=True)
    assert json.loads(said.stdout) == [words, told["HF_HOME"], told["OMP_X"]]


def test_deepspeed_itself_is_not_told_what_is_secret(hostfile: Callable[[str], str], tmp_path: Path) -> None:
    """It tells the other hosts each variable whose name begins with MLFLOW."""
    launch = LaunchConfig("deepspeed", 2, hostfile(f"{HERE} slots=1\nnode-b slots=1"))
    told = {"MLFLOW_TRACKING_TOKEN": "secret", "PATH": pdsh(tmp_path)}
    (start,) = starts(launch, "trace_dist", [], told, tmp_path)
    assert start.command[:3] == ["env", "--unset=MLFLOW_TRACKING_TOKEN", sys.executable]


def test_a_folder_that_pdsh_would_split_is_refused(
    hostfile: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks would begin in the home folder."""
    launch = LaunchConfig("deepspeed", 2, hostfile(f"{HERE} slots=1\nnode-b slots=1"))
    (tmp_path / "my work").mkdir()
    monkeypatch.chdir(tmp_path / "my work")
    with pytest.raises(
        ValueError, match=r"cannot hand '.*/my work' to the shells of other hosts; start in a"
    ):
        starts(launch, "trace_dist", [], {"PATH": pdsh(tmp_path)}, tmp_path)


def test_slurm(tmp_path: Path) -> None:
    launch = LaunchConfig("slurm", 4)
    with pytest.raises(
        ValueError, match="no Slurm job around this command; start it inside sbatch or salloc"
    ):
        starts(launch, "trace_dist", [], {}, tmp_path)
    inside = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-3,node-4"}
    (start,) = starts(launch, "trace_dist", ["train"], inside, tmp_path)
    assert start.command[:3] == ["srun", "--ntasks", "4"]
    assert start.environment["MASTER_ADDR"] == "node-3"
    assert not any("cpus" in word for word in start.command)
    (start,) = starts(launch, "trace_dist", ["train"], {**inside, "SLURM_CPUS_PER_TASK": "8"}, tmp_path)
    assert "--cpus-per-task=8" in start.command
    assert first_node({}) == HERE
    with pytest.raises(ValueError, match=r"^SLURM_JOB_NODELIST='node-\[3-4\]': .* put scontrol on the PATH"):
        first_node({"SLURM_JOB_NODELIST": "node-[3-4]"})
    with pytest.raises(ValueError, match=r"^launch\.hostfile='h': launcher slurm reads none"):
        LaunchConfig("slurm", 2, "h")


def test_what_other_hosts_are_told() -> None:
    names = [
        "PATH",
        "OMP_NUM_THREADS",
        "GLOO_SOCKET_IFNAME",
        "NCCL_SOCKET_IFNAME",
        "DS_ACCELERATOR",
        "TOKENIZERS_PARALLELISM",
        "PYTORCH_CUDA_ALLOC_CONF",
        "TRANSFORMERS_OFFLINE",
        "CUBLAS_WORKSPACE_CONFIG",
        "RCCL_MSCCL_ENABLE",
        "HSA_OVERRIDE_GFX_VERSION",
        "NVIDIA_TF32_OVERRIDE",
        "CUDA_DEVICE_MAX_CONNECTIONS",
    ]
    kept = ["HOME", "HF_TOKEN", "TRACE_API_KEY", "MASTER_ADDR", "LOCAL_RANK", "SLURM_PROCID"]
    kept += ["CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"]
    assert list(forwarded(dict.fromkeys([*names, *kept], "1"))) == names
    assert forwarded({"HF_HOME": "a\nb"}) == {}


def launched(monkeypatch: pytest.MonkeyPatch, interfaces: dict[str, str], local: str = "1") -> None:
    """A rank of two, on a host whose name means the loopback."""
    # Set first: what is chosen goes again afterwards.
    monkeypatch.setenv(network.GLOO, "none")
    monkeypatch.delenv(network.GLOO)
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": local, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    monkeypatch.setattr(network, "interfaces", lambda: interfaces)


def test_the_interface_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, {"10.0.0.1": "ib0"})
    network.choose_interface()
    assert os.environ[network.GLOO] == "ib0"


@pytest.mark.parametrize(
    ("variables", "spread"),
    [
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            False,
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "1"}, True),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, False),
        ({"FLUX_TASK_RANK": "1", "FLUX_JOB_SIZE": "2", "FLUX_JOB_NNODES": "2"}, True),
        ({"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2"}, True),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_NODES": "2"}, False),
    ],
    ids=["openmpi", "openmpi-here", "mpich", "mpich-silent", "flux", "srun", "sbatch"],
)
def test_the_interface_is_found_under_other_launchers(
    variables: dict[str, str], spread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched(monkeypatch, {"10.0.0.1": "ib0"})
    for name in [name for name in os.environ if name.startswith(("OMPI_", "PMI", "SLURM_", "FLUX_"))]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    network.choose_interface()
    assert os.environ.get(network.GLOO) == ("ib0" if spread else None)


def test_states_are_handed_out_where_other_hosts_reach_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """By ranks on the host that means its loopback by the name of the place to meet: the others' looked at home for rank 0."""
    launched(monkeypatch, {"192.168.0.1": "eth0", "10.0.0.1": "ib0"})
    assert part_server._own_host() == "192.168.0.1"
    monkeypatch.setenv(network.GLOO, "ib0")
    assert part_server._own_host() == "10.0.0.1"
    launched(monkeypatch, {"10.0.0.1": "ib0"}, local="2")
    assert part_server._own_host() == "127.0.0.1"
    launched(monkeypatch, {})
    assert part_server._own_host() == "127.0.0.1"


def test_gpus_are_counted_by_their_drivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_facts, "NVIDIA", str(tmp_path / "nvidia" / "*"))
    monkeypatch.setattr(host_facts, "AMD", str(tmp_path / "nodes" / "*" / "gpu_id"))
    assert host_facts.num_gpus() == 0
    for number, its_id in enumerate(("0", "4660", "22136")):  # the first is a CPU
        node = tmp_path / "nodes" / str(number)
        node.mkdir(parents=True)
        (node / "gpu_id").write_text(f"{its_id}\n")
    assert host_facts.num_gpus() == 2
    (tmp_path / "nvidia" / "0000:4e:00.0").mkdir(parents=True)
    assert host_facts.num_gpus() == 3


def test_a_host_without_gpus_among_others_is_named() -> None:
    answers = {"node-1": {"gpus": 8}, "node-2": {"gpus": 0}, "node-3": {"gpus": 8}}
    (line,) = checks._without_gpus(answers, {})
    assert line.startswith("node-2: no driver of GPUs, which the other hosts have; ")
    assert not list(checks._without_gpus(answers, {"DS_ACCELERATOR": "cpu"}))
    assert not list(checks._without_gpus({"node-1": {"gpus": 0}, "node-2": {"gpus": 0}}, {}))


def only_ipv6(monkeypatch: pytest.MonkeyPatch, own: str) -> None:
    """A host without IPv4, whose name means ``own`` to itself."""
    v6 = socket.AF_INET6
    places = {
        "lo": [
            SimpleNamespace(family=socket.AF_INET, address="127.0.0.1"),
            SimpleNamespace(family=v6, address="::1"),
        ],
        "eth0": [SimpleNamespace(family=v6, address=each) for each in ("fe80::1%eth0", "fd00:77::1")],
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: places)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: dict.fromkeys(places, SimpleNamespace(isup=True)))
    known = {"node-1": own, "node-1.cluster": "fd00:77::1", "node-2": "fd00:77::2"}
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda name, *_, **__: [(v6, socket.SOCK_STREAM, 6, "", (known[name], 0, 0, 0))],
    )


@pytest.mark.parametrize("own", ["fd00:77::1", "::1", "127.0.1.1"])
def test_a_host_without_ipv4_is_known(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name had no address, and no interface was up."""
    monkeypatch.setenv(network.GLOO, "none")
    monkeypatch.delenv(network.GLOO)
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "node-2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "gethostname", lambda: "node-1")
    only_ipv6(monkeypatch, own)
    assert network.interfaces() == {"fd00:77::1": "eth0"}
    assert network.joining_address() == "fd00:77::1"
    network.choose_interface()
    assert os.environ.get(network.GLOO) == (None if own == "fd00:77::1" else "eth0")
    assert [Host(name, 1).is_here for name in ("node-1.cluster", "node-2")] == [True, False]


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_port_is_reached_by_either_kind_of_address(address: str) -> None:
    with network.open_port() as listener:
        if ":" in address and listener.family != socket.AF_INET6:
            pytest.skip("this machine has no IPv6")
        socket.create_connection((address, listener.getsockname()[1]), timeout=5).close()


def test_an_interface_that_is_not_clear_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, {"10.0.0.1": "ib0", "192.168.0.1": "eth0"})
    with pytest.raises(
        ValueError, match=r"set GLOO_SOCKET_IFNAME to the interface that joins the hosts \(eth0, ib0\)"
    ):
        network.choose_interface()
    launched(monkeypatch, {"10.0.0.1": "ib0", "192.168.0.1": "eth0"}, local="2")
    network.choose_interface()  # all ranks are here
    assert network.GLOO not in os.environ


@pytest.mark.parametrize(
    ("says", "problem"),
    [
        ("echo welcome to this cluster", "far: says 'welcome to this cluster' where it should answer"),
        ("echo 70000; echo []", "far: says '70000"),
        ("echo; echo lost >&2; exit 3", "far: cannot start anything there (lost)"),
        ("exit 255", "far: cannot start anything there (no word); `ssh far true` must work"),
        ("exec sleep 1000", "far: has not answered within 0.1 s; log in with `ssh far`"),
    ],
)
def test_a_host_that_does_not_answer_as_it_should(
    says: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it waited for where it says nothing at all."""
    (tmp_path / "ssh").write_text(f"#!/bin/sh\n{says}\n")
    (tmp_path / "ssh").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)
    monkeypatch.setattr(Host, "is_here", False)
    if "sleep" in says:
        monkeypatch.setattr(checks, "ANSWER_SECONDS", 0.1)
    found = checks.check_hosts([Host("far", 1)], str(tmp_path), [], dict(os.environ))
    assert found.lines == []
    (said,) = found.problems
    assert said.startswith(problem)


def test_without_ssh_the_hosts_are_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Host, "is_here", False)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = checks.check_hosts([Host("far", 1)], str(tmp_path), [], dict(os.environ))
    assert found.problems[0].startswith(
        "far: ssh: cannot be started here (No such file or directory); install"
    )


def test_what_the_system_refuses_is_one_line(
    hostfile: Callable[[str], str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "file").write_text("")
    asked = [
        "--backend",
        "zero3",
        "--launch.launcher",
        "torchrun",
        "--launch.num_ranks",
        "2",
        "--launch.hostfile",
    ]
    asked += [hostfile(f"{HERE} slots=1\n127.0.0.2 slots=1"), "--run_dir", str(tmp_path / "file" / "run")]
    assert main(["launch", "--dry_run", "true", "train", "--config", "example:words", *asked]) == 2
    assert capfd.readouterr().err.startswith(f"error: {tmp_path}/file/run: Not a directory; check paths")
