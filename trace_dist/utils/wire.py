"""Connections between ranks that carry short records, one JSON object a line, without ever making anybody wait."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from trace_dist.utils.network import open_port

CONNECT_SECONDS = 5.0
_LONGEST_LINE = 2**16


@dataclass(frozen=True)
class Place:
    """Where rank 0 listens: its addresses, the most likely first, a port, and a word that shows who belongs to the job."""

    addresses: list[str]
    port: int
    token: str


class Wire:
    """One connection.

    Args:
        connection: its socket.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection
        self._received, self._waiting = b"", bytearray()

    @property
    def is_full(self) -> bool:
        """Whether the other end takes nothing more for now."""
        self._flush()
        return bool(self._waiting)

    def send(self, record: Mapping[str, Any]) -> None:
        """Send a record, now or with a later one."""
        if self.socket.fileno() >= 0:
            self._waiting += json.dumps(record).encode() + b"\n"
            self._flush()

    def receive(self) -> list[dict[str, Any]] | None:
        """The records that have come; None where the other end is gone, or sends something else."""
        try:
            data = self.socket.recv(_LONGEST_LINE)
        except BlockingIOError:
            return []
        except OSError:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        if not data or len(self._received) > _LONGEST_LINE:
            return None
        records = []
        for line in lines:
            with suppress(ValueError):
                record = json.loads(line)
                records += [record] if isinstance(record, dict) else []
        return records

    def _flush(self) -> None:
        with suppress(OSError):
            while self._waiting:
                del self._waiting[: self.socket.send(self._waiting)]


def listen(everywhere: bool) -> socket.socket:
    """Rank 0's socket; on this machine alone unless ``everywhere``."""
    listener = open_port() if everywhere else socket.create_server(("127.0.0.1", 0), backlog=1024)
    listener.setblocking(False)
    return listener


def accept(listener: socket.socket) -> Wire | None:
    """A connection that somebody has opened."""
    with suppress(OSError):
        return Wire(listener.accept()[0])
    return None


def connect(place: Place) -> Wire | None:
    """A connection to rank 0; None where none of its addresses answers."""
    for address in place.addresses:
        with suppress(OSError):
            return Wire(socket.create_connection((address, place.port), timeout=CONNECT_SECONDS))
    return None
