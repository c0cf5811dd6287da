"""How one rank gets the optimizer states of all others while they train on.

[Note: rank 0 saves alone] Trainer calls ``optimizer.state_dict()`` and ``torch.save`` on rank 0 alone, since under DDP every
rank has the same states; ours are shared out over the ranks. A collective there would never end: the others are on their way
to the next step. So every rank has a thread that hands its part out over a socket, whatever its main thread does. The part is
that of the same step: a rank that is still in it is waited for, and none can be ahead, as its next step needs gradients of the
rank that asks. After the last step the others may be through with their work or with the script: they serve on until rank 0 is.

On a GPU the thread must wait neither for the device nor for the main thread's stream, where a collective may already be
waiting for the rank that asks: it copies on a stream of its own, after the event that ended the last step. Addresses and keys
are exchanged when the optimizer is built; tensors travel as safetensors, one parameter at a time, to whoever knows the key.
Neither end waits long for one that says nothing, as a host does whose packets are dropped; who waits for a step says so.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import secrets
import socket
import struct
import sys
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from threading import Condition, Thread
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from trace_dist.optim.states import State, tensors_of
from trace_dist.sharding.compaction import Support
from trace_dist.utils import dist, network
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)

Address = tuple[str, int]
WAIT_SECONDS = 600
"""How long a rank is waited for that has not ended the step yet, and how long a process stays for the sake of rank 0."""
QUIET_SECONDS = 60.0
"""How long one end may say nothing."""
SIGN_SECONDS = 5.0
"""How often one that waits for a step says so."""
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Source:
    """This rank's part of the states, without the optimizer, which must be free to go.

    Attributes:
        owned: (first, number) of each parameter's entries.
        entries: supports and states.
        values: what the weights hold at a support's entries, on the CPU, by copies alone.
    """

    owned: list[tuple[int, int]]
    entries: list[tuple[Support, State]]
    values: Callable[[Support], Tensor]

    def steps(self) -> list[int]:
        """The step count of each parameter."""
        return [state["step"] for _, state in self.entries]

    def tensors(self, index: int) -> dict[str, Tensor]:
        """One parameter's states on the CPU, and its values where no master is among them."""
        support, state = self.entries[index]
        part = {name: tensor.cpu() for name, tensor in tensors_of(state).items()}
        return part if "master" in state else {**part, "values": self.values(support)}


class Clock:
    """Optimizer steps that this rank has ended."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._changed = Condition()
        # The end of the last step in the stream that it ran in; not None iff it ran on a GPU.
        self._event: torch.cuda.Event | None = None
        self.steps = 0

    def tick(self) -> None:
        """A step has ended; on a GPU its work is in the current stream."""
        on_gpu = self._device.type == "cuda"
        event = torch.cuda.current_stream(self._device).record_event() if on_gpu else None
        with self._changed:
            self._event, self.steps = event, self.steps + 1
            self._changed.notify_all()

    def await_step(self, step: int, say: Callable[[], None]) -> str | None:
        """Wait until a step has ended, and say so; what is wrong, if it has not or another one has."""
        latest = time.monotonic() + WAIT_SECONDS
        while not self._has_ended(step):
            if time.monotonic() > latest:
                return f"has not ended step {step} after {WAIT_SECONDS} s"
            say()
        return None if self.steps == step else f"is at step {self.steps}, not {step}"

    def _has_ended(self, step: int) -> bool:
        """Whether a step has, or does soon."""
        with self._changed:
            return self._changed.wait_for(lambda: self.steps >= step, SIGN_SECONDS)

    @contextmanager
    def after_last_step(self) -> Iterator[None]:
        """Copies in this block run on a stream of their own, once the last step is through."""
        if self._event is None:
            yield
            return
        stream = torch.cuda.Stream(self._device)
        stream.wait_event(self._event)
        with torch.cuda.stream(stream):
            yield


class PartServer:
    """Hands this rank's part out, and asks the other ranks for theirs. Collective to build.

    Args:
        owner: the optimizer whose states they are.
        source: what to hand out.
        device: where the states are.
        linger: serve on when the owner, or the whole script, is through, until that is so on rank 0 too.
    """

    def __init__(self, owner: object, source: Source, device: torch.device, linger: bool) -> None:
        self.clock = Clock(device)
        self.others = OtherRanks(self)
        self._source, self._ended = source, False
        self._lingers = linger and dist.rank() > 0
        self._address: Address | None = None
        key = secrets.token_bytes(32)
        with suppress(OSError):  # training needs none of this; saving says what is missing
            host = _own_host()
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, 0), family=family, backlog=128)
            self._address = listener.getsockname()[:2]
            Thread(target=self._serve, args=(listener, key), daemon=True).start()
        self._everyone: list[tuple[Address | None, bytes]] = dist.gather_objects((self._address, key))
        weakref.finalize(owner, self._begin_to_end).atexit = False
        _SERVERS.add(self)

    def ask(self, rank: int) -> dict[str, Any]:
        """Another rank's part, at the step that this rank has ended.

        Raises:
            ValueError: it cannot be reached, or is at another step.
        """
        address, key = self._everyone[rank]
        failed = f"optimizer state: rank {rank} %s; save with trace_dist.checkpoint, where every rank writes its own part"
        if address is None:
            raise ValueError(failed % "could not open a port to hand its part out")
        try:
            with _limited(socket.create_connection(address, timeout=QUIET_SECONDS)) as connection:
                answer_challenge(connection, key)
                deliver_challenge(connection, key)
                connection.send_bytes(json.dumps({"step": self.clock.steps}).encode())
                while not (said := connection.recv_bytes()):
                    pass
                about = json.loads(said)
                if "fault" in about:
                    raise ValueError(failed % about["fault"])
                received = [load(connection.recv_bytes()) for _ in about["owned"]]
        except BlockingIOError:
            raise ValueError(
                failed % f"at {address[0]}:{address[1]} has said nothing for {QUIET_SECONDS:g} s"
            ) from None
        except (OSError, EOFError, AuthenticationError) as error:
            raise ValueError(failed % f"cannot be reached at {address[0]}:{address[1]} ({error})") from None
        values = [tensors.pop("values") if "values" in tensors else tensors["master"] for tensors in received]
        state = {
            index: {"step": step, **kept}
            for index, (step, kept) in enumerate(zip(about["steps"], received, strict=True))
        }
        return {"owned": [tuple(span) for span in about["owned"]], "state": state, "values": values}

    def ask_all(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The parts of all other ranks."""
        return ((rank, self.ask(rank)) for rank in range(len(self._everyone)) if rank != dist.rank())

    def await_rank_0(self, latest: float = math.inf) -> None:
        """Wait until what rank 0 trained is gone too, for it may still have to ask; ``latest`` by the monotonic clock."""
        while self._lingers and _reaches(self._everyone[0][0]) and time.monotonic() < latest:
            time.sleep(POLL_SECONDS)

    def _serve(self, listener: socket.socket, key: bytes) -> None:
        """Answer who asks, until the end; each in a thread, as one that says nothing would be waited for."""
        with listener:
            while not self._ended:
                with suppress(OSError):
                    Thread(target=self._attend, args=(listener.accept()[0], key), daemon=True).start()

    def _attend(self, taken: socket.socket, key: bytes) -> None:
        """Answer one that knows the key."""
        try:
            with _limited(taken) as connection:
                deliver_challenge(connection, key)
                answer_challenge(connection, key)
                self._answer(connection)
        except Exception as error:  # who asked hears of it by the end of the connection
            logger.debug("optimizer state: not handed out (%s)", error)

    def _answer(self, connection: Connection) -> None:
        step = json.loads(connection.recv_bytes())["step"]
        fault = self.clock.await_step(step, lambda: connection.send_bytes(b""))
        if fault is not None:
            connection.send_bytes(json.dumps({"fault": fault}).encode())
            return
        about = {"owned": self._source.owned, "steps": self._source.steps()}
        connection.send_bytes(json.dumps(about).encode())
        for index in range(len(self._source.owned)):
            with self.clock.after_last_step():
                tensors = self._source.tensors(index)
            connection.send_bytes(save(tensors))

    def _begin_to_end(self) -> None:
        """The owner is gone."""
        Thread(target=self._end, daemon=True).start()

    def _end(self) -> None:
        self.await_rank_0()
        self._ended = True
        _reaches(self._address)  # so that `_serve` looks


class OtherRanks:
    """Stands for the other ranks' parts in a state dict, and becomes them, rank -> part, when it is pickled or deep-copied."""

    def __init__(self, server: PartServer) -> None:
        self._server = server

    def __reduce__(self) -> tuple[Any, ...]:
        # An OrderedDict, as torch.load with weights_only=True knows no other class that is built from items.
        return OrderedDict, (), None, None, self._server.ask_all()


def _limited(taken: socket.socket) -> Connection:
    """A connection on which one that says, or takes, nothing for long is an error."""
    taken.settimeout(None)
    limit = struct.pack("ll", int(QUIET_SECONDS), int(QUIET_SECONDS % 1 * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        taken.setsockopt(socket.SOL_SOCKET, option, limit)
    return Connection(taken.detach())


def _own_host() -> str:
    """This machine's address on the way to the job's meeting point: the loopback where all ranks are on one machine."""
    found = network.address_towards(os.environ.get("MASTER_ADDR") or socket.gethostname()) or "127.0.0.1"
    # Rank 0's host may mean its loopback by its own name, and the other hosts would look for rank 0 at theirs.
    if network.leads_home(found) and network.spans_hosts():
        return network.joining_address() or found
    return found


def _reaches(address: Address | None) -> bool:
    """Whether a server is there."""
    if address is None:
        return False
    try:
        socket.create_connection(address, timeout=1).close()
    except OSError:
        return False
    return True


_SERVERS: weakref.WeakSet[PartServer] = weakref.WeakSet()


@atexit.register
def _linger() -> None:
    """Leave after rank 0; but at once where an error ends this process."""
    if not hasattr(sys, "last_value"):
        latest = time.monotonic() + WAIT_SECONDS
        for server in list(_SERVERS):
            server.await_rank_0(latest)
