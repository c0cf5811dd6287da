"""What can be known before ranks are started on several hosts: each is asked over ssh, and its answers are compared."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_dist.launching.commands import not_startable, ssh
from trace_dist.launching.environment import forwarded
from trace_dist.launching.host_facts import KEYS
from trace_dist.launching.hosts import Host
from trace_dist.utils.network import GLOO, leads_home, open_port

LEAST_GIB = 1.0
ANSWER_SECONDS = 60
_PORT = re.compile("[0-9]{1,5}")
Answer = dict[str, Any]


@dataclass(frozen=True)
class Findings:
    """What the hosts said.

    Attributes:
        lines: a line per host.
        problems: what would fail, each with its cure.
    """

    lines: list[str]
    problems: list[str]


def check_hosts(
    hosts: Sequence[Host], run_dir: str, files: Sequence[str], environment: Mapping[str, str]
) -> Findings:
    """Ask every host whether ranks could work there together.

    Args:
        hosts: all of them, this one first.
        run_dir: folder of the run.
        files: files and folders that every rank reads.
        environment: that of the ranks.
    """
    folder = Path(run_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with open_port() as listener, tempfile.NamedTemporaryFile(dir=folder, prefix=".seen-") as marker:
        request = {
            "hosts": [host.name for host in hosts],
            "place": [hosts[0].name, listener.getsockname()[1]],
            "run_dir": str(folder),
            "marker": marker.name,
            "files": [str(Path(file).absolute()) for file in files],
        }
        with ThreadPoolExecutor(len(hosts)) as pool:
            answers = list(pool.map(lambda host: _ask(host, request, environment), hosts))
    known = {
        host.name: answer for host, answer in zip(hosts, answers, strict=True) if isinstance(answer, dict)
    }
    problems = [
        f"{host.name}: {answer}"
        for host, answer in zip(hosts, answers, strict=True)
        if isinstance(answer, str)
    ]
    for host in hosts:
        if host.name in known:
            problems += [
                f"{host.name}: {problem}" for problem in _own_problems(host, known[host.name], environment)
            ]
    return Findings(
        [_line(host, known[host.name]) for host in hosts if host.name in known],
        [*problems, *_differences(known), *_without_gpus(known, environment)],
    )


def _ask(host: Host, request: Answer, environment: Mapping[str, str]) -> Answer | str:
    """What a host says; or why it says nothing."""
    asked = {**request, "place": None} if host.is_here else request
    try:
        talk = _talk(host, json.dumps(asked), environment)
    except OSError as error:
        return not_startable(_command(host, environment)[0], error)
    if talk is None:
        return (
            f"has not answered within {ANSWER_SECONDS} s; log in with `ssh {host.name}` to see what it does"
        )
    if talk.code != 0:
        last = (talk.complaint.strip().splitlines() or ["no word"])[-1]
        how = "the same checkout and virtual environment must be there, at the same paths"
        if talk.code == 255:
            how = f"`ssh {host.name} true` must work without a question"
        return f"cannot start anything there ({last}); {how}"
    try:
        answer = json.loads(talk.said)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict) or not answer.keys() >= KEYS:
        return (
            f"says {(talk.port + talk.said)[:80]!r} where it should answer; let its shell print nothing when it is no "
            f"terminal (`ssh {host.name} true` must be silent), and have the same checkout there"
        )
    return {**answer, "knocked": talk.knocked}


@dataclass(frozen=True)
class Talk:
    """What was heard of a host.

    Attributes:
        port: its first line, the port at which it listens.
        knocked: whether a connection to that port was taken.
        said: the rest.
        complaint: what it wrote to standard error.
        code: exit status.
    """

    port: str
    knocked: bool
    said: str
    complaint: str
    code: int


def _talk(host: Host, asked: str, environment: Mapping[str, str]) -> Talk | None:
    """Ask a host and knock at the port that it names; None where it takes too long."""
    process = subprocess.Popen(
        _command(host, environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(environment),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    late: list[bool] = []

    def give_up() -> None:
        late.append(True)
        process.kill()

    # Also where it says nothing at all: a line is waited for as long as it takes.
    timer = threading.Timer(ANSWER_SECONDS, give_up)
    timer.start()
    try:
        with suppress(BrokenPipeError):
            process.stdin.write(asked)
            process.stdin.close()
        port = process.stdout.readline().strip()
        at = "127.0.0.1" if host.is_here else host.name
        knocked = bool(_PORT.fullmatch(port)) and _knock(at, int(port))
        process.stdin = None
        said, complaint = process.communicate()
    finally:
        timer.cancel()
    return None if late else Talk(port, knocked, said, complaint, process.returncode)


def _command(host: Host, environment: Mapping[str, str]) -> list[str]:
    """What asks a host: here, or over ssh in the same folder and with what ranks are told."""
    command = [sys.executable, "-m", "trace_dist.launching.host_facts"]
    if host.is_here:
        return command
    told = [f"{name}={value}" for name, value in sorted(forwarded(environment).items())]
    text = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(['env', *told, *command])}"
    return [*ssh(host.name), text]


def _knock(address: str, port: int) -> bool:
    with suppress(OSError, OverflowError):
        socket.create_connection((address, port), timeout=5).close()
        return True
    return False


def _own_problems(host: Host, answer: Answer, environment: Mapping[str, str]) -> Iterator[str]:
    if not answer["knocked"] or not answer["reaches"]:
        way = "from there to the first host" if answer["knocked"] else "from the first host to there"
        yield f"no connection {way}; open all ports between the hosts, as ranks choose their own"
    lost = [name for name, address in answer["addresses"].items() if address is None]
    if lost:
        yield f"does not know the address of {', '.join(lost)}; add it to /etc/hosts or DNS there"
    for variable, named in answer["named_interfaces"].items():
        first = named.lstrip("^=").split(",")[0]
        if not named.startswith("^") and not any(
            name.startswith(first) for name in answer["interfaces"].values()
        ):
            known = ", ".join(sorted(set(answer["interfaces"].values())))
            yield f"{variable}={named}: there is no such interface; name one of {known}"
    if GLOO not in answer["named_interfaces"] and len(set(answer["interfaces"].values())) != 1:
        own = answer["addresses"].get(host.name) or ""
        if leads_home(own):
            yield f"its own name means {own} to itself, and it has several interfaces; set {GLOO} to the one that joins the hosts"
    if answer["free_gib"] is not None and answer["free_gib"] < LEAST_GIB:
        yield f"only {answer['free_gib']} GiB are free for the run folder; make room"
    if not answer["shared"]:
        yield "does not see what the first host writes into the run folder; put run_dir on a file system that all hosts share"
    if not answer["ninja"]:
        yield "has no ninja in its PATH, with which DeepSpeed compiles; activate the virtual environment before you start"
    if 0 < answer["gpus"] < host.slots and environment.get("DS_ACCELERATOR") != "cpu":
        yield f"has {answer['gpus']} GPUs for {host.slots} ranks; lower its slots"


def _differences(answers: Mapping[str, Answer]) -> Iterator[str]:
    """What all hosts must have in common, and have not."""
    packages = sorted({name for answer in answers.values() for name in answer["packages"]})
    files = sorted({name for answer in answers.values() for name in answer["files"]})
    compared = {
        "python": ("python",),
        "the code of trace_dist": ("code",),
        **{name: ("packages", name) for name in packages},
        **{name: ("files", name) for name in files},
    }
    for what, keys in compared.items():
        values = {name: _at(answer, keys) for name, answer in answers.items()}
        if len(set(values.values())) > 1:
            said = ", ".join(f"{value or 'nothing'} on {name}" for name, value in values.items())
            yield f"{what} differs: {said}; make it the same everywhere"


def _without_gpus(answers: Mapping[str, Answer], environment: Mapping[str, str]) -> Iterator[str]:
    """Hosts without a GPU among others: their ranks would wait for each other, and never meet."""
    bare = [name for name, answer in answers.items() if not answer["gpus"]]
    if environment.get("DS_ACCELERATOR") == "cpu" or environment.get("CUDA_VISIBLE_DEVICES") == "":
        return
    if 0 < len(bare) < len(answers):
        yield (
            f"{', '.join(bare)}: no driver of GPUs, which the other hosts have; see to it there, or leave that host out"
        )


def _at(answer: Any, keys: Sequence[str]) -> str | None:
    for key in keys:
        answer = answer.get(key)
    return None if answer is None else str(answer)


def _line(host: Host, answer: Answer) -> str:
    places = ", ".join(f"{name} {address}" for address, name in answer["interfaces"].items())
    gpus = f", {answer['gpus']} GPUs" if answer["gpus"] else ""
    return (
        f"{host.name}: slots {host.slots}{gpus}; {places}; python {answer['python']}, torch {answer['packages']['torch']}, "
        f"deepspeed {answer['packages']['deepspeed']}; {answer['free_gib']} GiB free"
    )
