"""What a host says of itself before a job starts there.

    python -m trace_dist.launching.host_facts < REQUEST_AS_JSON

Prints a port on which it listens, and, when somebody has knocked there or a while has passed, one JSON object. Loads no torch.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import shutil
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trace_dist.utils import network
from trace_dist.utils.env import PACKAGES, code_digest

KNOCK_SECONDS = 10.0
WHOLE_BYTES = 2**26
"""Larger files are compared by their size, their first and their last bytes."""
END_BYTES = 2**20
NVIDIA, AMD = "/proc/driver/nvidia/gpus/*", "/sys/class/kfd/kfd/topology/nodes/*/gpu_id"
"""What stands for GPUs; of AMD's nodes those of CPUs have the id 0."""
KEYS = frozenset(
    {
        *("hostname", "addresses", "interfaces", "named_interfaces", "reaches", "python", "packages", "code"),
        *("free_gib", "shared", "gpus", "ninja", "files", "heard"),
    }
)
"""What an answer has."""


def main() -> None:
    """Answer the request on standard input."""
    request = json.loads(sys.stdin.read())
    with network.open_port() as listener:
        listener.settimeout(KNOCK_SECONDS)
        print(listener.getsockname()[1], flush=True)
        heard = False
        with suppress(OSError):
            listener.accept()[0].close()
            heard = True
    print(json.dumps({**about(request), "heard": heard}), flush=True)


def about(request: dict[str, Any]) -> dict[str, Any]:
    """What is asked of this host.

    Args:
        request: ``hosts`` (names), ``place`` (address and port where the first host listens, or null), ``run_dir``, ``marker``
            (a file that the first host has just written), ``files`` (to compare).
    """
    return {
        "hostname": socket.gethostname(),
        "addresses": {name: network.resolved(name) for name in request["hosts"]},
        "interfaces": network.interfaces(),
        "named_interfaces": {
            name: os.environ[name] for name in (network.GLOO, "NCCL_SOCKET_IFNAME") if name in os.environ
        },
        "reaches": request["place"] is None or _reaches(*request["place"]),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "code": code_digest(),
        "free_gib": _free_gib(request["run_dir"]),
        "shared": Path(request["marker"]).is_file(),
        "gpus": num_gpus(),
        "ninja": shutil.which("ninja") is not None,
        "files": {name: digest(Path(name)) for name in request["files"]},
    }


def num_gpus() -> int:
    """GPUs that the drivers of this host have."""
    return len(glob.glob(NVIDIA)) + sum(
        Path(node).read_text(encoding="ascii").strip() != "0" for node in glob.glob(AMD)
    )


def _reaches(address: str, port: int) -> bool:
    with suppress(OSError):
        socket.create_connection((address, port), timeout=KNOCK_SECONDS / 2).close()
        return True
    return False


def _version(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)
    return None


def _free_gib(folder: str) -> float | None:
    """Room where a folder is, or will be."""
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    with suppress(OSError):
        return round(shutil.disk_usage(path).free / 2**30, 1)
    return None


def digest(path: Path) -> str | None:
    """What a file, or the files of a folder, hold; None where there is none."""
    found = hashlib.sha256()
    files: Sequence[Path] = [path] if path.is_file() else sorted(p for p in path.glob("*") if p.is_file())
    if not files:
        return None
    try:
        for file in files:
            found.update(file.name.encode() + file.stat().st_size.to_bytes(8, "big"))
            _add(found, file)
    except OSError:
        return None
    return found.hexdigest()[:16]


def _add(found: Any, file: Path) -> None:
    with file.open("rb") as handle:
        if file.stat().st_size <= WHOLE_BYTES:
            found.update(handle.read())
        else:
            found.update(handle.read(END_BYTES))
            handle.seek(-END_BYTES, os.SEEK_END)
            found.update(handle.read())


if __name__ == "__main__":
    main()
