"""Hosts made of network namespaces on this machine, with what they need from Debian: each has its own network, host name,
shared memory, /etc/hosts and sshd. The file system is shared. They hang on a switch in a namespace of its own, so that no packet
leaves this machine. As Debian sets it up, a host takes its own name for 127.0.1.1."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from warm.client import read_at_import

from trace_dist.launching.environment import forwarded

PACKAGES = {"ip": "iproute2", "sshd": "openssh-server", "pdsh": "pdsh", "nsenter": "util-linux"}
SBIN = "/usr/sbin:/sbin"
SSH_CONFIG = "Host *\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
HOST_SCRIPT = """
echo $$ >{folder}/pid{number}; hostname node-{number}
mount -t tmpfs tmpfs /dev/shm
mount --bind {folder}/hosts{number} /etc/hosts
home=$(getent passwd "$(id -u)" | cut -d: -f6); mkdir -p "$home/.ssh"; mount --bind {folder}/ssh "$home/.ssh"
exec {sshd} -D -e -f {folder}/sshd_config
"""


def find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:{SBIN}")


def install() -> str | None:
    """Install what is missing; why that is not possible, or None."""
    missing = [package for program, package in PACKAGES.items() if find(program) is None]
    if not missing:
        return None
    if os.geteuid() != 0 or find("apt-get") is None:
        return f"needs {', '.join(missing)}, and root on Debian to install them"
    for words in (["install"], ["update"], ["install"]):
        command = [
            "apt-get",
            *words,
            *(["-y", "--no-install-recommends", *missing] if words == ["install"] else []),
        ]
        try:
            done = subprocess.run(
                command,
                timeout=120,
                env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
                capture_output=True,
                text=True,
            )
        except subprocess.TimeoutExpired:
            return f"{' '.join(command)}: no answer within 120 s"
        if words == ["install"] and done.returncode == 0:
            return None
    return f"apt-get cannot install {', '.join(missing)}: {done.stderr[-300:]}"


def forbidden() -> str | None:
    """Why there can be no hosts here: packages cannot be had, or namespaces are forbidden; None where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if (reason := install()) is not None:
        return reason
    name = f"td-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, env=environment())
    if made.returncode != 0:
        return f"network namespaces are forbidden here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True, env=environment())
    entered = subprocess.run(["unshare", "--mount", "--uts", "--ipc", "true"], capture_output=True, text=True)
    return None if entered.returncode == 0 else f"namespaces are forbidden here: {entered.stderr.strip()}"


def environment() -> dict[str, str]:
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:{SBIN}"}


@dataclass(frozen=True)
class Hosts:
    """Hosts node-1, node-2, ... at 10.77.0.1, ...

    Attributes:
        folder: their files.
        number: how many there are.
        names: of their network namespaces, the switch's first.
    """

    folder: Path
    number: int
    names: list[str]

    @property
    def hostfile(self) -> Path:
        return self.folder / "hostfile"

    def on(self, host: int, *command: object) -> list[str]:
        """A command line that runs on a host, in the folder where it is started."""
        pid = (self.folder / f"pid{host}").read_text().strip()
        return ["nsenter", "-t", pid, "-n", "-m", "-u", "-i", f"--wd={Path.cwd()}", "--", *map(str, command)]

    def link(self, host: int, up: bool) -> None:
        """Pull a host's cable, or put it back."""
        ip("-n", self.names[0], "link", "set", f"port{host}", "up" if up else "down")


def ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True, env=environment(), capture_output=True)


@contextmanager
def hosts(number: int) -> Iterator[Hosts]:
    """Hosts, while the block runs. Whatever was started on them ends with it."""
    folder = Path(tempfile.mkdtemp(prefix="td-hosts-"))
    names = [f"td-{os.getpid()}-{host}" for host in range(number + 1)]
    found = Hosts(folder, number, names)
    _end(_left_over())
    try:
        _write_files(folder, number)
        _connect(names)
        for host in range(1, number + 1):
            _begin(found, host)
        yield found
    finally:
        _end(names)
        shutil.rmtree(folder, ignore_errors=True)


def _end(names: list[str]) -> None:
    """Remove namespaces, and end what runs there."""
    for name in names:
        pids = subprocess.run(
            ["ip", "netns", "pids", name], capture_output=True, text=True, env=environment()
        )
        for pid in pids.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), 9)
        subprocess.run(["ip", "netns", "del", name], capture_output=True, env=environment())


def _left_over() -> list[str]:
    """Namespaces of a test that was killed."""
    said = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, env=environment())
    found = re.findall(r"^(td-(\d+)-\d+)\b", said.stdout, re.MULTILINE)
    return [name for name, pid in found if not Path(f"/proc/{pid}").exists()]


def _write_files(folder: Path, number: int) -> None:
    (folder / "ssh").mkdir(mode=0o700)
    for key in ("ssh/id_ed25519", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    shutil.copy(folder / "ssh/id_ed25519.pub", folder / "ssh/authorized_keys")
    (folder / "ssh/config").write_text(SSH_CONFIG)
    # What all processes of this machine have alike, but for what a launcher has to hand on.
    alike = read_at_import(dict(os.environ))
    lines = [f"{name}={value}\n" for name, value in alike.items() if name not in forwarded(os.environ)]
    (folder / "ssh/environment").write_text("".join(line for line in lines if line.count("\n") == 1))
    others = {host: f"10.77.0.{host} node-{host}\n" for host in range(1, number + 1)}
    for host in others:
        lines = [line for other, line in others.items() if other != host]
        (folder / f"hosts{host}").write_text(f"127.0.0.1 localhost\n127.0.1.1 node-{host}\n" + "".join(lines))
    (folder / "hostfile").write_text("".join(f"node-{host} slots=1\n" for host in others))
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/ssh/authorized_keys\nPasswordAuthentication no\n"
        "PermitRootLogin prohibit-password\nPermitUserEnvironment yes\nStrictModes no\nUsePAM no\nMaxStartups 100\n"
    )
    Path("/run/sshd").mkdir(parents=True, exist_ok=True)


def _connect(names: list[str]) -> None:
    switch, *own = names
    ip("netns", "add", switch)
    ip("-n", switch, "link", "add", "br0", "type", "bridge")
    ip("-n", switch, "link", "set", "br0", "up")
    for host, name in enumerate(own, 1):
        ip("netns", "add", name)
        ip(
            "link",
            "add",
            "eth0",
            "netns",
            name,
            "type",
            "veth",
            "peer",
            "name",
            f"port{host}",
            "netns",
            switch,
        )
        ip("-n", switch, "link", "set", f"port{host}", "master", "br0")
        ip("-n", switch, "link", "set", f"port{host}", "up")
        ip("-n", name, "addr", "add", f"10.77.0.{host}/24", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        ip("-n", name, "link", "set", "lo", "up")


def _begin(found: Hosts, host: int) -> None:
    script = HOST_SCRIPT.format(folder=found.folder, number=host, sshd=find("sshd"))
    inside = ["unshare", "--mount", "--uts", "--ipc", "sh", "-c", script]
    log = (found.folder / f"sshd{host}.log").open("w")
    subprocess.Popen(
        ["ip", "netns", "exec", found.names[host], *inside],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    deadline = time.monotonic() + 20
    pid = found.folder / f"pid{host}"
    while not (pid.is_file() and pid.read_text().strip()) or not _answers(found, host):
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"node-{host} does not come up: {(found.folder / f'sshd{host}.log').read_text()[-500:]}"
            )
        time.sleep(0.1)


def _answers(found: Hosts, host: int) -> bool:
    return subprocess.run(found.on(host, "ssh", "localhost", "true"), capture_output=True).returncode == 0
