"""What a simulated rank asked of its accelerator, in the order in which the host asked.

A program is recorded once and replayed (``replay``) for any GPU and any bandwidth; only the number of ranks changes what is
asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from trace_dist.profiling.simulation.calls import Call

COMPUTE = "compute"
"""The stream that is there from the beginning."""
HOSTS = "hosts"
"""The lane of collectives of CPU tensors, in which hosts agree among themselves."""
Kind = Literal["kernel", "collective", "joins", "host_waits", "host_works", "hook", "mark"]
Work = Literal["matmul", "attention", "optimizer", "pick", "bus", "other"]
WORK: tuple[Work, ...] = ("matmul", "attention", "optimizer", "pick", "bus", "other")
"""What kernels do; ``pick`` is all between a layer's gradient and the compact buffer, exchange apart; ``bus`` are copies from and
to host memory."""


class Event(NamedTuple):
    """One request of the host's.

    Attributes:
        kind: ``kernel``; ``collective``; ``joins``: a stream waits for the end of ``after``; ``host_waits``: the host does;
            ``host_works``: it reads and writes its own memory; ``hook``: the sharding library's own work at a module; ``mark``: a
            phase begins.
        stream: on which stream.
        name: of the work of a kernel, of the collective's operator, or of the phase.
        flops: of matrix products and attention.
        num_bytes: a kernel reads and writes; a collective sends from this rank.
        number: of this event; what others wait for.
        after: number of the event to wait for; -1 for the last one of ``target``.
        target: a stream, where ``after`` is -1.
        lane: process group of a collective.
        size: bytes of a collective's whole operand.
        ranks: of a collective's group.
        wide: whether the product is one of fp32 numbers.
        operator: which operator, on what, where the recorder was asked to keep that (``calls``).
    """

    kind: Kind
    stream: str
    name: str = ""
    flops: int = 0
    num_bytes: float = 0.0
    number: int = 0
    after: int = -1
    target: str = ""
    lane: str = ""
    size: int = 0
    ranks: int = 0
    wide: bool = False
    operator: str = ""


@dataclass(frozen=True)
class Program:
    """One optimizer step of one rank, and its memory.

    Attributes:
        events: in order of time.
        world_size: ranks.
        states: bytes between steps, gathered copies included.
        peak: the most bytes at one moment of the step.
        kept: bytes between steps by category, from the objects that hold them; what is left of ``states`` is ``buffers``.
        num_tokens: tokens of this rank's step.
        num_trained: trained parameters, of all ranks, or, of a mask, of this one.
        host: bytes between steps in host memory.
        calls: ``Event.operator`` -> what was called, where the recorder was asked to keep that.
    """

    events: Sequence[Event]
    world_size: int
    states: int
    peak: int
    kept: dict[str, int]
    num_tokens: int
    num_trained: int
    host: int = 0
    calls: Mapping[str, Call] = field(default_factory=dict)

    def _of(self, kind: Kind) -> Iterator[Event]:
        return (event for event in self.events if event.kind == kind)

    @property
    def launches(self) -> dict[str, int]:
        """Kernels by what they do; collectives are not counted."""
        return dict(Counter(event.name for event in self._of("kernel")))

    @property
    def flops(self) -> int:
        """Operations of matrix products and attention."""
        return sum(event.flops for event in self._of("kernel"))

    @property
    def moved(self) -> float:
        """Bytes that kernels read and write."""
        return sum(event.num_bytes for event in self._of("kernel"))

    @property
    def host_waits(self) -> int:
        """How often the host waits until a stream has done all that it was given."""
        return sum(event.after == -1 for event in self._of("host_waits"))

    def sent(self) -> dict[str, tuple[int, float]]:
        """Collective -> (how many, bytes that this rank sends)."""
        found: dict[str, tuple[int, float]] = {}
        for event in self._of("collective"):
            number, size = found.get(event.name, (0, 0.0))
            found[event.name] = number + 1, size + event.num_bytes
        return found
