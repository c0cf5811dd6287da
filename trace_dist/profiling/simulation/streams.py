"""Streams and events of an accelerator that is not there: they tell the recorder who waits for whom."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from trace_dist.profiling.simulation.events import COMPUTE


class Told(Protocol):
    """What streams tell."""

    stream: str

    def joins(self, stream: str, after: int = -1, target: str = "") -> None:
        """A stream waits."""

    def host_waits(self, after: int = -1, target: str = "") -> None:
        """The host waits."""

    def last(self, stream: str) -> int:
        """Number of the last event of a stream."""


class Stream:
    """A stream by name."""

    def __init__(self, told: Told, name: str) -> None:
        self.told, self.name = told, name

    def wait_stream(self, other: Stream) -> None:
        """What comes next here begins after all that is there."""
        if other.name != self.name:
            self.told.joins(self.name, self.told.last(other.name))

    def wait_event(self, event: Event) -> None:
        """What comes next here begins after the event."""
        self.told.joins(self.name, event.number)

    def record_event(self, event: Event | None = None) -> Event:
        """The end of what is here now."""
        event = event or Event(self.told)
        event.record(self)
        return event

    def synchronize(self) -> None:
        """The host waits for what is here now."""
        self.told.host_waits(target=self.name)

    def query(self) -> bool:
        """Never known to be done: whether it is depends on the replay."""
        return False


class Event:
    """The end of what a stream had been given."""

    def __init__(self, told: Told) -> None:
        self.told, self.number = told, -1

    def record(self, stream: Stream | None = None) -> None:
        """Remember the end of a stream."""
        self.number = self.told.last(self.told.stream if stream is None else stream.name)

    def wait(self, stream: Stream | None = None) -> None:
        """Let a stream wait."""
        self.told.joins(self.told.stream if stream is None else stream.name, self.number)

    def synchronize(self) -> None:
        """The host waits."""
        if self.number >= 0:
            self.told.host_waits(self.number)

    def query(self) -> bool:
        """See ``Stream.query``."""
        return False


class Streams:
    """All streams of the accelerator."""

    def __init__(self, told: Told) -> None:
        self._told = told
        self._all = {COMPUTE: Stream(told, COMPUTE)}

    def make(self, *_: Any, **__: Any) -> Stream:
        """A new stream."""
        name = f"side {len(self._all)}"
        self._all[name] = Stream(self._told, name)
        return self._all[name]

    def event(self, *_: Any, **__: Any) -> Event:
        """A new event."""
        return Event(self._told)

    def default(self, *_: Any) -> Stream:
        """The stream that was there first."""
        return self._all[COMPUTE]

    def current(self, *_: Any) -> Stream:
        """The stream to which work goes now."""
        return self._all[self._told.stream]

    @contextmanager
    def on(self, stream: Stream | None) -> Iterator[None]:
        """Work goes to a stream inside the block."""
        before = self._told.stream
        self._told.stream = before if stream is None else stream.name
        try:
            yield
        finally:
            self._told.stream = before

    def synchronize(self, *_: Any) -> None:
        """The host waits for everything."""
        for name in self._all:
            self._told.host_waits(target=name)
