"""The hosts of a job: a hostfile as DeepSpeed's and MPI's launchers read it."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from pathlib import Path

from trace_dist.config import LaunchConfig
from trace_dist.utils import network

_LINE = re.compile(r"^(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)\s+slots=(?P<slots>[1-9][0-9]{0,5})$")

_LOOPBACK = re.compile(r"localhost(\.|$)|127\.")


@dataclass(frozen=True)
class Host:
    """A host of a job.

    Attributes:
        name: name or IPv4 address, by which the other hosts reach it.
        slots: ranks on it.
    """

    name: str
    slots: int

    @property
    def is_here(self) -> bool:
        """Whether it is this machine."""
        if self.name in (socket.gethostname(), socket.gethostname().partition(".")[0], "localhost"):
            return True
        address = network.resolved(self.name)
        return address is not None and (network.leads_home(address) or address in network.addresses())


def read_hostfile(path: str | Path) -> list[Host]:
    """The hosts of a hostfile, one ``NAME slots=RANKS`` a line; ``#`` begins a comment.

    Raises:
        ValueError: it is not there, a line is none, or a host is named twice.
    """
    field = f"launch.hostfile={str(path)!r}"
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    # ValueError: it is no text, or the path cannot be one.
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{field}: cannot be read ({error}); name a file with a line `NAME slots=RANKS` per host"
        ) from None
    hosts: list[Host] = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = _LINE.match(text)
        if found is None:
            raise ValueError(
                f"{field}: line {number} is {text[:80]!r}; write `NAME slots=RANKS`, as `node-1 slots=8`"
            )
        if found["name"] in (host.name for host in hosts):
            raise ValueError(
                f"{field}: {found['name']} is there twice; give it one line with all of its ranks"
            )
        hosts.append(Host(found["name"], int(found["slots"])))
    if not hosts:
        raise ValueError(f"{field}: it names no host; write a line `NAME slots=RANKS` per host")
    return hosts


def hosts_of(launch: LaunchConfig) -> list[Host]:
    """The hosts on which ranks are started, this one first; empty where all ranks are on this machine.

    Raises:
        ValueError: the hostfile is wrong, does not begin with this machine, or has other slots than the ranks asked for.
    """
    if launch.hostfile is None:
        return []
    hosts = read_hostfile(launch.hostfile)
    slots = sum(host.slots for host in hosts)
    if slots != launch.num_ranks:
        raise ValueError(
            f"launch.num_ranks={launch.num_ranks}: {launch.hostfile} has {slots} slots; set --launch.num_ranks {slots}"
        )
    if not hosts[0].is_here:
        raise ValueError(
            f"launch.hostfile={launch.hostfile!r}: its first host is {hosts[0].name}, and this is {socket.gethostname()}; start "
            "the command on the first host, whose rank 0 writes the results, or put this host first"
        )
    if _LOOPBACK.match(hosts[0].name) and not all(host.is_here for host in hosts):
        raise ValueError(
            f"launch.hostfile={launch.hostfile!r}: its first host is {hosts[0].name}, by which every other host means itself, "
            f"and would look for rank 0 there; give the name by which they reach this machine, as {socket.gethostname()}"
        )
    if launch.launcher == "accelerate" and len({host.slots for host in hosts}) > 1:
        raise ValueError(
            f"launch.hostfile={launch.hostfile!r}: accelerate starts as many ranks on every host; give all hosts the same slots, "
            "or set launch.launcher to torchrun"
        )
    return hosts if len(hosts) > 1 else []
