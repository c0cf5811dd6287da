"""One process that has imported what commands import, and forks for each: a start takes a tenth of a second, not ten.

    python -m warm.server SOCKET EXECUTABLE

What differs from an interpreter of its own: all forks hash strings alike, and a module that nothing imports may be there already.
Tests of either, of signals and of process ids start interpreters of their own.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import random
import runpy
import selectors
import signal
import socket
import struct
import sys
import threading
import types
from contextlib import suppress
from pathlib import Path
from typing import Any

from warm.client import read_at_import

Request = dict[str, Any]
NAMESPACES = ("ipc", "uts", "net", "mnt")
"""In which hosts of the tests differ (hosts/namespaces.py)."""
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def warm() -> None:
    """Import what commands import, also what they do not import before they need it, and read one configuration: what is found
    out of classes for it is kept. Libraries with OpenMP runtimes of their own (scikit-learn) are left to the forks."""
    import bitsandbytes  # noqa: F401
    import matplotlib.backends.backend_svg  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch.distributed.run  # noqa: F401
    from deepspeed.launcher import launch, runner  # noqa: F401
    from transformers.models.llama import modeling_llama, tokenization_llama  # noqa: F401

    from trace_dist.cli import bank_commands, commands  # noqa: F401
    from trace_dist.cli.parser import parse
    from trace_dist.continual import driver  # noqa: F401
    from trace_dist.serving import router, server  # noqa: F401
    from trace_dist.sharding import fsdp2, zero3  # noqa: F401
    from trace_dist.stages import ask, learn, pipeline, report, shapes  # noqa: F401
    from trace_dist.train import task  # noqa: F401

    parse(["run", "--config", str(QUICKSTART)])


def receive(client: socket.socket) -> tuple[Request | None, list[int]]:
    """A request, and the client's three standard files; no request from a client that was killed before it had asked."""
    size, files, _, _ = socket.recv_fds(client, 8, 3)
    length, data = int.from_bytes(size, "big"), b""
    while len(data) < length and (part := client.recv(length - len(data))):
        data += part
    return json.loads(data) if length and len(data) == length else None, files


def say(client: socket.socket, **what: int | None) -> None:
    with suppress(OSError):  # the client was killed
        client.sendall(json.dumps(what).encode() + b"\n")


def enter_host(client: socket.socket) -> None:
    """Go where the client is, if that is a host made of namespaces."""
    size = struct.calcsize("3i")
    pid, _, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    places = [(f"/proc/{pid}/ns/{kind}", f"/proc/self/ns/{kind}") for kind in NAMESPACES]
    files = [os.open(theirs, os.O_RDONLY) for theirs, own in places if not os.path.samefile(theirs, own)]
    for file in files:
        if ctypes.CDLL(None, use_errno=True).setns(file, 0) != 0:
            raise OSError(ctypes.get_errno(), "setns")
        os.close(file)


class Server:
    """Forks for every client; a client that is killed takes its fork along."""

    def __init__(self, listener: socket.socket, environment: dict[str, str]) -> None:
        self._selector = selectors.DefaultSelector()
        self._read = read_at_import(environment)
        self._listener = listener
        self._clients: dict[int, socket.socket] = {}  # pid -> who asked
        self._ends: dict[int, int] = {}  # pid -> a file that is readable at its end
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._selector.register(0, selectors.EVENT_READ, self._close)

    def serve(self) -> Request:
        """Returns in forks alone, with what they are to run."""
        while True:
            for key, _ in self._selector.select():
                if (request := key.data()) is not None:
                    return request

    def _accept(self) -> Request | None:
        client, _ = self._listener.accept()
        request, files = receive(client)
        if request is None:
            client.close()
        elif read_at_import(request["environment"]) != self._read:
            say(client, pid=None)
            client.close()
        elif (pid := os.fork()) == 0:
            self._forget()
            os.setsid()
            for own, file in enumerate(files):
                os.dup2(file, own)
                os.close(file)
            enter_host(client)
            client.close()
            return request
        else:
            self._clients[pid], self._ends[pid] = client, os.pidfd_open(pid)
            self._selector.register(client, selectors.EVENT_READ, lambda: self._gone(pid))
            self._selector.register(self._ends[pid], selectors.EVENT_READ, lambda: self._ended(pid))
            say(client, pid=pid)
        for file in files:
            os.close(file)
        return None

    def _forget(self) -> None:
        """What belongs to the server alone, in a fork."""
        self._selector.close()
        self._listener.close()
        for client in self._clients.values():
            client.close()
        for end in self._ends.values():
            os.close(end)

    def _gone(self, pid: int) -> None:
        if pid in self._ends:
            self._selector.unregister(self._clients[pid])
            os.kill(pid, signal.SIGKILL)

    def _ended(self, pid: int) -> None:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        end, client = self._ends.pop(pid), self._clients.pop(pid)
        self._selector.unregister(end)
        os.close(end)
        with suppress(KeyError):  # it was killed before
            self._selector.unregister(client)
        say(client, code=code)
        client.close()

    def _close(self) -> None:
        for pid in self._ends:
            os.kill(pid, signal.SIGKILL)
        os._exit(0)


def become(request: Request, executable: str) -> None:
    """What ``executable words...`` does, in this process."""
    import datasets
    import numpy

    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    random.seed()
    numpy.random.seed()
    if cache := os.environ.get("HF_DATASETS_CACHE"):
        datasets.config.HF_DATASETS_CACHE = Path(cache)
    words = list(request["words"])
    sys.executable, sys.orig_argv = executable, [executable, *words]
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if words[0] == "-u":
        del words[0]
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    if any(Path(path, "sitecustomize.py").is_file() for path in paths):
        sys.path[:0] = paths
        importlib.import_module("sitecustomize")
        del sys.path[: len(paths)]
    match words:
        case ["-m", module, *rest]:
            sys.path[:0] = [os.getcwd(), *paths]
            sys.argv = ["-m", *rest]
            sys.modules.pop(module, None)
            runpy._run_module_as_main(module)
        case ["-c", code, *rest]:
            sys.path[:0] = ["", *paths]
            sys.argv = ["-c", *rest]
            exec(compile(code, "<string>", "exec"), main.__dict__)
        case [script, *rest]:
            sys.path[:0] = [str(Path(script).resolve().parent), *paths]
            sys.argv = [script, *rest]
            main.__file__ = script
            exec(compile(Path(script).read_bytes(), script, "exec"), main.__dict__)


def end(request: Request, executable: str) -> None:
    """Run a request, and end as an interpreter ends, but do not take a million objects apart; does not return."""
    code: Any = 0
    try:
        become(request, executable)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def main(path: str, executable: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    environment = dict(os.environ)
    warm()
    own = ["", os.getcwd(), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    sys.path[:] = [entry for entry in sys.path if entry not in own]
    gc.collect()
    gc.freeze()
    end(Server(listener, environment).serve(), executable)


if __name__ == "__main__":
    main(*sys.argv[1:])
