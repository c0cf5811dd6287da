"""How a module is started on the ranks of a configuration: a command for this machine, or one per host."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from trace_dist.config import LaunchConfig
from trace_dist.launching.environment import SECRET, forwarded
from trace_dist.launching.hosts import Host, hosts_of
from trace_dist.utils.files import writing

KEEPALIVE_SECONDS = 5
VISIBLE = "CUDA_VISIBLE_DEVICES"
SHOWN = {
    "none": "trace-dist",
    "deepspeed": "deepspeed --num_gpus {ranks} --module trace_dist",
    "torchrun": "torchrun --nproc_per_node {ranks} -m trace_dist",
    "accelerate": "accelerate launch --num_processes {ranks} -m trace_dist",
    "slurm": "srun --ntasks {ranks} python -m trace_dist",
}


@dataclass(frozen=True)
class Start:
    """A process to start.

    Attributes:
        command: what.
        host: where; None is here.
        environment: variables that it has beside those of this process.
    """

    command: list[str]
    host: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


def launch_command(launch: LaunchConfig, module: str = "trace_dist") -> list[str]:
    """How a module is started on the ranks of a configuration, as one command of this machine, up to and including its name.

    Raises:
        ValueError: ranks are on several hosts, and these are not as they must be.
    """
    if launch.launcher == "slurm" or hosts_of(launch):
        settings = json.dumps(asdict(launch))
        return [sys.executable, "-m", "trace_dist.launching.supervisor", settings, module]
    return _LOCAL[launch.launcher](launch.num_ranks, free_port(), module)


def starts(
    launch: LaunchConfig, module: str, words: Sequence[str], environment: Mapping[str, str], scratch: Path
) -> list[Start]:
    """What is started where, for a module with arguments.

    Args:
        launch: how.
        module: what ``python -m`` starts.
        words: its arguments.
        environment: of this process; other hosts are told a part of it.
        scratch: folder for files that launchers read.

    Raises:
        ValueError: something that it takes is not there.
    """
    if launch.launcher == "slurm":
        return _slurm(launch.num_ranks, module, words, environment)
    hosts = hosts_of(launch)
    if not hosts:
        return [Start([*_LOCAL[launch.launcher](launch.num_ranks, free_port(), module), *words])]
    if launch.launcher == "deepspeed":
        return [_over_pdsh(launch, hosts, module, words, environment, scratch)]
    own, port = _ON_HOSTS[launch.launcher], free_port()
    return [
        _over_ssh(host, [*own(hosts, number, port, module), *words], environment, launch.silence_seconds)
        for number, host in enumerate(hosts)
    ]


def shown_launch(launch: LaunchConfig) -> str:
    """How a user starts a command on the ranks of a configuration: what stands before the command's name."""
    return "trace-dist launch" if launch.hostfile else SHOWN[launch.launcher].format(ranks=launch.num_ranks)


def _none(ranks: int, port: int, module: str) -> list[str]:
    return [sys.executable, "-m", module]


def _deepspeed(ranks: int, port: int, module: str) -> list[str]:
    # What its runner starts on one machine. That passes CUDA_VISIBLE_DEVICES by, and ends with 0 where what it started is killed.
    here = json.dumps({"localhost": _gpus(ranks)}).encode()
    world = f"--world_info={base64.urlsafe_b64encode(here).decode()}"
    place = ["--master_addr=127.0.0.1", f"--master_port={port}"]
    return [sys.executable, "-m", "deepspeed.launcher.launch", world, *place, "--module", module]


def _gpus(ranks: int) -> list[int | str]:
    """The GPUs of ranks: those that CUDA_VISIBLE_DEVICES names, or the first ones.

    Raises:
        ValueError: it names fewer.
    """
    named = [each.strip() for each in os.environ.get(VISIBLE, "").split(",") if each.strip()]
    # Loads torch, which the command line can do without.
    import torch

    if not named or os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return list(range(ranks))
    if len(named) < ranks:
        raise ValueError(
            f"launch.num_ranks={ranks}: {VISIBLE}={os.environ[VISIBLE]} names {len(named)} for them; name one for each rank, or "
            f"set --launch.num_ranks {len(named)}"
        )
    return list(named[:ranks])


def _torchrun(ranks: int, port: int, module: str) -> list[str]:
    start = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(port)]
    return [sys.executable, *start, "-m", module]


def _accelerate(ranks: int, port: int, module: str, *machines: str) -> list[str]:
    start = [
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        str(ranks),
        "--main_process_port",
        str(port),
    ]
    start += [*(machines or ("--num_machines", "1")), "--mixed_precision", "no", "--dynamo_backend", "no"]
    # Those that are visible: a user's own configuration of accelerate may name others.
    start += ["--gpu_ids", "all"]
    # Its word for several processes; without a GPU they compute on the CPU.
    return [sys.executable, *start, "--multi_gpu", "-m", module]


_LOCAL: dict[str, Callable[[int, int, str], list[str]]] = {
    "none": _none,
    "deepspeed": _deepspeed,
    "torchrun": _torchrun,
    "accelerate": _accelerate,
}


def _torchrun_on(hosts: list[Host], number: int, port: int, module: str) -> list[str]:
    # Over c10d the order of the hosts would be that of their names, and rank 0 must be where the run folder is.
    start = [
        "--nnodes",
        str(len(hosts)),
        "--node_rank",
        str(number),
        "--nproc_per_node",
        str(hosts[number].slots),
    ]
    place = ["--master_addr", hosts[0].name, "--master_port", str(port)]
    return [sys.executable, "-m", "torch.distributed.run", *start, *place, "-m", module]


def _accelerate_on(hosts: list[Host], number: int, port: int, module: str) -> list[str]:
    machines = ["--num_machines", str(len(hosts)), "--machine_rank", str(number)]
    machines += ["--main_process_ip", hosts[0].name, "--rdzv_backend", "static"]
    return _accelerate(sum(host.slots for host in hosts), port, module, *machines)


_ON_HOSTS: dict[str, Callable[[list[Host], int, int, str], list[str]]] = {
    "torchrun": _torchrun_on,
    "accelerate": _accelerate_on,
}


def ssh(host: str, silence_seconds: float = 30.0) -> list[str]:
    """How a command is started on another host: no question is asked, and a link that is down is noticed."""
    alive = max(1, round(silence_seconds / KEEPALIVE_SECONDS))
    options = {"BatchMode": "yes", "ConnectTimeout": 10, "ServerAliveInterval": KEEPALIVE_SECONDS}
    options |= {"ServerAliveCountMax": alive}
    return ["ssh", *(f"-o{name}={value}" for name, value in options.items()), host]


def _over_ssh(host: Host, command: list[str], environment: Mapping[str, str], silence: float) -> Start:
    if host.is_here:
        return Start(command)
    told = [f"{name}={value}" for name, value in sorted(forwarded(environment).items())]
    # The tether ends what it starts when this end is gone.
    there = ["env", *told, sys.executable, "-m", "trace_dist.launching.tether", *command]
    text = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(there)}"
    return Start([*ssh(host.name, silence), text], host.name)


def _over_pdsh(
    launch: LaunchConfig,
    hosts: list[Host],
    module: str,
    words: Sequence[str],
    environment: Mapping[str, str],
    scratch: Path,
) -> Start:
    if shutil.which("pdsh", path=environment.get("PATH")) is None:
        raise ValueError(
            "launch.launcher='deepspeed': it starts other hosts' ranks with pdsh, which is not installed here; install pdsh, or "
            "set launch.launcher to torchrun, which takes ssh alone"
        )
    for place in (os.getcwd(), sys.executable):
        # It writes both into a line of a shell as they are.
        if shlex.quote(place) != place or "%" in place:
            raise ValueError(
                f"launch.launcher='deepspeed': DeepSpeed cannot hand {place!r} to the shells of other hosts; start in a "
                "folder, and with an environment, whose path has no special character, or set launch.launcher to torchrun"
            )
    start = ["-m", "deepspeed.launcher.runner", "--hostfile", str(launch.hostfile), "--launcher", "pdsh"]
    # -N: what ranks print stays as it is.
    start += [
        "--launcher_args=-N",
        "--master_addr",
        hosts[0].name,
        "--master_port",
        str(free_port()),
        "--module",
    ]
    # pdsh hands all to the shells of the hosts; DeepSpeed itself puts words with blanks into quotation marks, and escapes those.
    quoted = [_in_marks(word) if " " in word else shlex.quote(word) for word in words]
    own = {
        "DS_ENV_FILE": str(_environment_file(environment, scratch)),
        "PDSH_SSH_ARGS_APPEND": " ".join(ssh("", launch.silence_seconds)[1:-1]),
    }
    # It would tell the hosts some of them by itself (MLFLOW_TRACKING_TOKEN).
    hidden = [f"--unset={name}" for name in sorted(environment) if SECRET.search(name)]
    begin = [*(["env", *hidden] if hidden else []), sys.executable, *start, module]
    return Start([*begin, *(word.replace("%", "%%") for word in quoted)], None, own)


def _in_marks(text: str) -> str:
    """What a shell reads as ``text`` between quotation marks, its own quotation marks left as they are."""
    return re.sub(r"[\\$`]", r"\\\g<0>", text)


def _environment_file(environment: Mapping[str, str], scratch: Path) -> Path:
    """What DeepSpeed tells every host: ours, and what the user's own file adds."""
    # Of a value DeepSpeed escapes nothing, and puts quotation marks around one that has special characters.
    told = {
        name: _in_marks(value).replace('"', r"\"").replace("%", "%%")
        for name, value in forwarded(environment).items()
    }
    lines = [f"{name}={value}" for name, value in sorted(told.items())]
    # Where the user has no home it is no file.
    own = Path(os.path.expanduser("~/.deepspeed_env"))
    if own.is_file():
        lines += [line for line in own.read_text().splitlines() if "=" in line]
    path = scratch / "deepspeed_env"
    with writing(path):
        path.write_text("".join(line + "\n" for line in lines))
    return path


def _slurm(ranks: int, module: str, words: Sequence[str], environment: Mapping[str, str]) -> list[Start]:
    if "SLURM_JOB_ID" not in environment:
        raise ValueError(
            "launch.launcher='slurm': there is no Slurm job around this command; start it inside sbatch or salloc, as "
            "launch/slurm.sbatch does"
        )
    command = ["srun", "--ntasks", str(ranks), "--kill-on-bad-exit=1", "--export=ALL"]
    # Since Slurm 22.05 a step does not inherit the job's cores per task: without it a rank has one.
    if cores := environment.get("SLURM_CPUS_PER_TASK"):
        command.append(f"--cpus-per-task={cores}")
    place = {"MASTER_ADDR": first_node(environment), "MASTER_PORT": str(free_port())}
    return [Start([*command, sys.executable, "-m", module, *words], None, place)]


def first_node(environment: Mapping[str, str]) -> str:
    """The host of a Slurm job's first rank."""
    nodes = environment.get("SLURM_JOB_NODELIST", "")
    if "[" in nodes:
        try:
            shown = subprocess.run(
                ["scontrol", "show", "hostnames", nodes],
                capture_output=True,
                text=True,
                check=True,
                timeout=60,
            )
            nodes = shown.stdout.split()[0]
        except (OSError, subprocess.SubprocessError, IndexError) as error:
            raise ValueError(
                f"SLURM_JOB_NODELIST={nodes!r:.80}: `scontrol show hostnames` does not say what its first host is "
                f"({error}); put scontrol on the PATH"
            ) from None
    return nodes.partition(",")[0] or socket.gethostname()


def not_startable(program: str, error: OSError) -> str:
    """What is said of a program, such as ssh or srun, that cannot be started."""
    return f"{program}: cannot be started here ({error.strerror}); install it, or put it on the PATH"


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
