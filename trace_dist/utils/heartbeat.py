"""Signs of life between ranks, so that one that is lost is named, and all others end instead of waiting in silence.

Every rank holds a connection to rank 0 and says on it once a second what it is in. A rank that ends without a word, or gives no
sign of life for long, is lost: rank 0 names it, its host and what it was in, and ends all others. Where rank 0 is the one that is
lost, every other rank says so. Rank 0 also ends a job in which every rank waits for the others, and nothing moves.

[Note: time] A process that was stopped, with its whole job, must not find on waking that all others were silent. So silence is
counted in turns of the thread that listens, each of which counts two beats at most, however long it took.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from trace_dist.utils import stopping
from trace_dist.utils.activity import Activity, Watcher
from trace_dist.utils.codes import FAILED, LOST
from trace_dist.utils.wire import Wire, accept

CURE = (
    "all ranks end; see to that host, and start the same command again: it goes on from its newest checkpoint"
)
CONNECT_SECONDS = 10.0
FIRST_REMARK_SECONDS = 60.0
_logger = logging.getLogger("trace_dist.heartbeat")


@dataclass(frozen=True)
class Patience:
    """How long is too long.

    Attributes:
        silence_seconds: a rank without a sign of life.
        stuck_minutes: all ranks wait for each other, and nothing moves.
        grace_seconds: how long a rank that was told to end may still report.
        failing_seconds: the same where a rank fails with an error of its own; often the others have it too.
    """

    silence_seconds: float = 60.0
    stuck_minutes: float = 10.0
    grace_seconds: float = 5.0
    failing_seconds: float = 15.0


@dataclass(frozen=True)
class Verdict:
    """Why this process ends.

    Attributes:
        text: what to print; empty where another rank prints it.
        code: its exit code.
        seconds: how long the main thread may still end by itself.
    """

    text: str
    code: int
    seconds: float


@dataclass
class _Peer:
    """Another rank, as seen from here; -1 until it has said which."""

    rank: int
    wire: Wire
    silence: float = 0.0
    warned: bool = False
    left: bool = False
    activity: Activity = field(default_factory=Activity)

    def send(self, record: Mapping[str, Any]) -> None:
        """Send it something, unless it has left."""
        if not self.left:
            self.wire.send(record)


class Heartbeat:
    """The signs of life of one rank.

    Args:
        rank: this rank.
        hosts: host name of every rank.
        patience: how long is too long.
        listener: on rank 0: the socket on which it listens.
        hub: on other ranks: the connection to rank 0.
        token: the job's word.
    """

    def __init__(
        self,
        rank: int,
        hosts: list[str],
        patience: Patience,
        token: str,
        *,
        listener: socket.socket | None = None,
        hub: Wire | None = None,
    ) -> None:
        self.rank, self.hosts, self.patience = rank, hosts, patience
        self.verdict: Verdict | None = None
        self._token, self._listener = token, listener
        self._beat = min(1.0, patience.silence_seconds / 5)
        self._selector = selectors.DefaultSelector()
        self._peers: dict[int, _Peer] = {}
        self._watcher, self._mine = Watcher(), Activity()
        self._remark_after = FIRST_REMARK_SECONDS
        self._left, self._printed = False, False
        # Taken again where a signal's handler interrupts its holder.
        self._told, self._lock = threading.Event(), threading.RLock()
        self._missed_after = time.monotonic() + CONNECT_SECONDS
        if listener is not None:
            self._selector.register(listener, selectors.EVENT_READ, None)
        if hub is not None:
            self._peers[0] = _Peer(0, hub)
            self._selector.register(hub.socket, selectors.EVENT_READ, self._peers[0])
            self._peers[0].send({"rank": rank, "token": token})
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def leave(self, ok: bool) -> None:
        """Say that this rank ends, so that nobody counts it as lost; ``ok`` is whether its work is done."""
        with self._lock:
            if self._left:
                return
            self._left = True
            for peer in self._peers.values():
                peer.send({"bye": ok})

    def await_verdict(self, seconds: float) -> Verdict | None:
        """Why a collective may have failed just now: what is known of a lost rank within some seconds."""
        self._told.wait(seconds)
        return self.verdict

    def claim(self) -> bool:
        """Whether the caller is the first that wants to print the verdict."""
        with self._lock:
            first, self._printed = not self._printed, True
            return first

    def request_stop(self) -> None:
        """Let rank 0 know that this rank was asked to stop."""
        with self._lock:
            for peer in self._peers.values():
                peer.send({"stop": True})

    def overview(self) -> str:
        """What every rank is in, as far as it is known here."""
        return "; ".join(f"{self._name(rank)} in {activity}" for rank, activity in self._activities())

    def _activities(self) -> Iterator[tuple[int, Activity]]:
        known = {rank: peer.activity for rank, peer in self._peers.items() if not peer.left}
        yield from sorted({**known, self.rank: self._mine}.items())

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self.hosts[rank]}"

    def _run(self) -> None:
        last = time.monotonic()
        due = last
        while self.verdict is None:
            for key, _ in self._selector.select(max(0.0, due - time.monotonic())):
                with self._lock:
                    if key.data is None:
                        self._accept()
                    else:
                        self._receive(key.data)
            now = time.monotonic()
            turn, last = min(now - last, 2 * self._beat), now
            if now >= due:
                due = now + self._beat
                with self._lock:
                    self._tell()
            with self._lock:
                self._judge(turn)
        self._end()

    def _accept(self) -> None:
        assert self._listener is not None
        wire = accept(self._listener)
        if wire is not None:
            self._selector.register(wire.socket, selectors.EVENT_READ, _Peer(-1, wire))

    def _receive(self, peer: _Peer) -> None:
        records = peer.wire.receive()
        if records is None:
            self._drop(peer)
            if peer.rank >= 0 and not peer.left and not self._left:
                self._lose(
                    f"{self._name(peer.rank)} has ended without a word; it was in {peer.activity}; look there for what "
                    f"killed it, often the system for want of memory; {CURE}"
                )
            return
        if records:
            peer.silence, peer.warned = 0.0, False
        for record in records:
            with suppress(ValueError, TypeError, KeyError, AttributeError):
                self._hear(peer, record)

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.wire.socket)
        peer.wire.socket.close()

    def _hear(self, peer: _Peer, said: Mapping[str, Any]) -> None:
        if peer.rank < 0:
            if said["token"] == self._token and 0 < said["rank"] < len(self.hosts):
                peer.rank = said["rank"]
                self._peers[peer.rank] = peer
                if self._left:
                    peer.send({"bye": True})
            else:
                self._drop(peer)
        elif "bye" in said:
            peer.left = True
            if not said["bye"] and not self._left:
                # It prints its own error.
                self._lose("", FAILED)
        elif "end" in said:
            self._set(Verdict("", int(said["end"]), float(said["seconds"])))
        elif "stop" in said:
            stopping.hear()
        else:
            peer.activity = Activity.from_json(said["activity"])

    def _tell(self) -> None:
        self._mine = self._watcher.look()
        for peer in self._peers.values():
            # What waits to be sent says as much.
            if not peer.wire.is_full:
                peer.send({"activity": asdict(self._mine)})

    def _judge(self, turn: float) -> None:
        """Look for ranks that are silent too long, and for a job in which nothing moves."""
        if self._left or self.verdict is not None:
            return
        limit = self.patience.silence_seconds
        for peer in self._peers.values():
            if peer.left:
                continue
            peer.silence += turn
            if peer.silence > limit:
                self._lose(
                    f"{self._name(peer.rank)} has given no sign of life for {limit:g} s (launch.silence_seconds); it was in "
                    f"{peer.activity}; its process or its host has stopped, or its link is down; {CURE}"
                )
                return
            if peer.silence > limit / 3 and not peer.warned:
                peer.warned = True
                _logger.warning(
                    "%s has given no sign of life for %.0f s; it was in %s; waiting for it until %g s",
                    *(self._name(peer.rank), peer.silence, peer.activity, limit),
                )
        if self._listener is not None:
            self._look_for_missing()
            self._look_for_standstill()

    def _look_for_missing(self) -> None:
        missing = [rank for rank in range(1, len(self.hosts)) if rank not in self._peers]
        if missing and time.monotonic() > self._missed_after:
            self._missed_after = float("inf")
            _logger.warning(
                "%s cannot reach rank 0 on %s; open its ports to the other hosts: a loss of contact is noticed late otherwise",
                *(", ".join(map(self._name, missing)), self.hosts[0]),
            )

    def _look_for_standstill(self) -> None:
        seen = dict(self._activities())
        still = min(activity.still for activity in seen.values())
        waiting = [rank for rank, activity in seen.items() if activity.collective]
        if len(waiting) == len(self.hosts):
            if still > 60 * self.patience.stuck_minutes:
                self._lose(
                    f"every rank has waited for the others for {self.patience.stuck_minutes:g} min (launch.stuck_minutes): "
                    f"{self.overview()}; a message between them was lost, or they disagree on what comes next; start the same "
                    "command again: it goes on from its newest checkpoint"
                )
            return
        longest = max((seen[rank].still for rank in waiting), default=0.0)
        if longest < FIRST_REMARK_SECONDS:
            self._remark_after = FIRST_REMARK_SECONDS
        elif longest >= self._remark_after:
            self._remark_after *= 2
            busy = "; ".join(f"{self._name(rank)} in {seen[rank]}" for rank in seen if rank not in waiting)
            _logger.info(
                "%d of %d ranks have waited for %.0f s: %s", len(waiting), len(self.hosts), longest, busy
            )

    def _lose(self, text: str, code: int = LOST) -> None:
        seconds = self.patience.grace_seconds if code == LOST else self.patience.failing_seconds
        for peer in self._peers.values():
            peer.send({"end": code, "seconds": seconds})
        self._set(Verdict(f"lost contact: {text}" if text else "", code, seconds))

    def _set(self, verdict: Verdict) -> None:
        if self.verdict is None and not self._left:
            self.verdict = verdict
            self._told.set()

    def _end(self) -> None:
        """End this process, unless the main thread does so meanwhile."""
        verdict = self.verdict
        assert verdict is not None
        # At once: a launcher that has seen the loss too ends this process at any moment.
        if verdict.text and self.claim():
            report(verdict.text, self.rank)
        time.sleep(verdict.seconds)
        sys.stdout.flush()
        # From a thread, while the main thread may hang in a collective: nothing milder ends the process.
        os._exit(verdict.code)


def report(text: str, rank: int) -> None:
    """Print an error as one line."""
    where = f" [rank {rank}]" if rank else ""
    with suppress(OSError):  # a log on a full disk
        print(f"error{where}: {text}", file=sys.stderr, flush=True)
