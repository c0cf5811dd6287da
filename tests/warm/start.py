"""The start of a server, and of what stands for an interpreter and for the programs of launchers."""

from __future__ import annotations

import atexit
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from warm.client import QUIET

HERE = Path(__file__).parent
STUB = """#!{python} -IS
import sys

sys.path.insert(0, {here!r})
from client import main

main({socket!r}, {python!r}, sys.argv[1:])
"""
COMMANDS = ("trace-dist", "torchrun", "deepspeed", "accelerate")


def start(environment: Mapping[str, str]) -> Path:
    """Start a server that ends with this process; the folder of its ``python``, and of commands that it runs."""
    made = Path(tempfile.mkdtemp(prefix="warm-"))
    bin_folder, socket, stub = Path(sys.executable).parent, made / "socket", made / "python"
    stub.write_text(STUB.format(python=sys.executable, here=str(HERE), socket=str(socket)))
    stub.chmod(0o755)
    for name in COMMANDS:
        first, _, rest = (bin_folder / name).read_text().partition("\n")
        assert first.startswith("#!"), f"{name} is no script"
        (made / name).write_text(f"#!{stub}\n{rest}")
        (made / name).chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, "-m", "warm.server", str(socket), str(stub)],
        env={**environment, **QUIET},
        stdin=subprocess.PIPE,
    )
    atexit.register(_close, server, made)
    while not socket.exists():
        assert server.poll() is None, "the warm server did not start"
        time.sleep(0.02)
    return made


def _close(server: subprocess.Popen[bytes], made: Path) -> None:
    assert server.stdin is not None
    server.stdin.close()
    server.wait()
    shutil.rmtree(made)
