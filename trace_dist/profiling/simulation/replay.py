"""How long a recorded step takes on a GPU: a stated model, every answer of which is a prediction.

    kernel       max(operations / rate, bytes / bandwidth, shortest kernel)
    collective   base + steps x latency + max(bytes within the node / link, bytes between nodes / network)
    agreement    of hosts: 2 log2(ranks) messages, for which the host waits
    host         a time for each operator, for each fetch or release of a module by DeepSpeed, and for each byte of its own work

The host gives work to streams in the order of the program. A kernel begins when the host has given it and its stream is free; a
collective when its process group and the links are free too. A stream waits where the program lets it wait, so that what
overlaps in the prediction is what the program allows to overlap. Kernels of side streams take the compute stream's time.

Rings: an all-gather of W ranks takes W - 1 steps, a reduce-scatter as many, an all-reduce twice as many, as NCCL's own model has
them (``src/graph/tuning.cc``: latencies of a step). Rings enter and leave a node once for each of its GPUs, so that what crosses
the border is shared by the node's network cards. An all-to-all sends to each rank directly.

[Note: bounds] ``low`` lets all shares rise by a tenth and rings take logarithmically many steps, as trees do; ``high`` lets
shares fall by a fifth and nothing overlap: the compute stream waits for each collective.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import ceil, log2

from trace_dist.profiling.simulation.events import COMPUTE, HOSTS, Event, Program
from trace_dist.profiling.simulation.gpus import Gpu

MESSAGE_US = 50.0
"""A message between two hosts, over TCP; what hosts agree on takes two logarithms of them."""
WAITS = {
    "gather": "waiting for gathers",
    "exchange": "waiting for exchanges",
    "indices": "waiting for indices",
    "reduce": "waiting for reductions",
    "rows": "waiting for heads and slices",
}
"""Lane, or kind of collective -> where the time goes that a stream waits for it."""


@dataclass(frozen=True)
class Cluster:
    """Where a job runs.

    Attributes:
        gpu: each rank's.
        nodes: machines.
        gpus_per_node: ranks of each.
        link_gbps: network of one GPU's share, 1e9 bits per second, one way.
        overlaps: whether collectives overlap with kernels ([Note: bounds]).
        trees: whether a collective takes logarithmically many steps.
    """

    gpu: Gpu
    nodes: int
    gpus_per_node: int
    link_gbps: float
    overlaps: bool = True
    trees: bool = False

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.nodes * self.gpus_per_node

    def bounds(self) -> dict[str, Cluster]:
        """``low``, ``expected``, ``high`` ([Note: bounds])."""
        return {
            "low": replace(self, gpu=_scaled(self.gpu, 1.1), trees=True),
            "expected": self,
            "high": replace(self, gpu=_scaled(self.gpu, 0.8), overlaps=False),
        }


def _scaled(gpu: Gpu, factor: float) -> Gpu:
    names = ("matmul_share", "attention_share", "memory_share", "link_share")
    return replace(gpu, **{name: min(1.0, factor * getattr(gpu, name)) for name in names})


@dataclass(frozen=True)
class Timing:
    """Seconds of one step.

    Attributes:
        step: all of it.
        phases: forward, backward, optimizer.
        spent: where the compute stream's time goes: kernels by what they do, waiting by what for. They add up to ``step``.
        collectives: seconds of the collectives by name, overlapped or not.
        crossing: bytes that this rank sends inside its node, and to other nodes.
    """

    step: float
    phases: dict[str, float]
    spent: dict[str, float]
    collectives: dict[str, float]
    crossing: dict[str, float]


@dataclass
class _Clock:
    """Where everybody is, in seconds."""

    cluster: Cluster
    host: float = 0.0
    link: float = 0.0
    streams: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    lanes: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    ends: dict[int, float] = field(default_factory=dict)
    kinds: dict[int, str] = field(default_factory=dict)
    debt: float = 0.0  # of side streams' kernels, to the compute stream
    spent: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    collectives: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    crossing: dict[str, float] = field(default_factory=lambda: {"node": 0.0, "network": 0.0})
    marks: list[tuple[str, float]] = field(default_factory=list)

    def kernel(self, event: Event) -> None:
        seconds = kernel_seconds(self.cluster.gpu, event)
        self.host += self.cluster.gpu.host_us / 1e6
        on_compute = event.stream == COMPUTE
        if on_compute:
            seconds, self.debt = seconds + self.debt, 0.0
            self.spent["waiting for the host"] += max(0.0, self.host - self.streams[COMPUTE])
            self.spent[event.name] += seconds
        else:
            self.debt += seconds
        self.streams[event.stream] = max(self.streams[event.stream], self.host) + seconds
        self.ends[event.number] = self.streams[event.stream]
        if self.cluster.gpu.synchronous:
            self.host = self.streams[event.stream]

    def collective(self, event: Event) -> None:
        if event.lane == HOSTS:
            self.host += 2 * ceil(log2(self.cluster.world_size)) * MESSAGE_US / 1e6
            return
        seconds = collective_seconds(self.cluster, event)
        self.host += self.cluster.gpu.host_us / 1e6
        begin = max(self.streams[event.stream], self.lanes[event.lane], self.link, self.host)
        self.lanes[event.lane] = self.link = self.ends[event.number] = begin + seconds
        kind = "reduce" if "reduce" in event.name else event.lane.partition(" ")[0]
        self.kinds[event.number] = WAITS[kind]
        self.collectives[event.name] += seconds
        for where, num_bytes in sent_where(self.cluster, event).items():
            self.crossing[where] += num_bytes
        if not self.cluster.overlaps:
            self._wait(COMPUTE, begin + seconds, self.kinds[event.number])

    def joins(self, event: Event) -> None:
        if event.after in self.ends:
            self.kinds.setdefault(event.after, "waiting for side streams")
            self._wait(event.stream, self.ends[event.after], self.kinds[event.after])
            self.kinds[event.number] = self.kinds[event.after]
        self.ends[event.number] = self.streams[event.stream]
        if self.cluster.gpu.synchronous:
            self.host = max(self.host, self.streams[event.stream])

    def _wait(self, stream: str, until: float, why: str) -> None:
        if stream == COMPUTE:
            self.spent[why] += max(0.0, until - self.streams[COMPUTE])
        self.streams[stream] = max(self.streams[stream], until)

    def host_waits(self, event: Event) -> None:
        until = self.ends.get(event.after, 0.0) if event.after >= 0 else self.streams[event.target]
        self.host = max(self.host, until)


def replay(program: Program, cluster: Cluster) -> Timing:
    """The time of a program's step.

    Raises:
        ValueError: it was recorded for another number of ranks.
    """
    if program.world_size != cluster.world_size:
        raise ValueError(
            f"nodes={cluster.nodes}, gpus_per_node={cluster.gpus_per_node}: the step was recorded for "
            f"{program.world_size} ranks; record it for as many as there are"
        )
    clock = _Clock(cluster)
    for event in program.events:
        if event.kind == "kernel":
            clock.kernel(event)
        elif event.kind == "collective":
            clock.collective(event)
        elif event.kind == "joins":
            clock.joins(event)
        elif event.kind == "host_waits":
            clock.host_waits(event)
        elif event.kind == "hook":
            clock.host += cluster.gpu.hook_us / 1e6
        elif event.kind == "host_works":
            clock.host += event.num_bytes / (1e9 * cluster.gpu.host_gbps)
        else:
            clock.marks.append((event.name, max(clock.streams[COMPUTE], clock.host)))
    end = max(clock.host, *clock.streams.values(), *clock.lanes.values(), clock.streams[COMPUTE])
    clock.spent["waiting for the host"] += end - clock.streams[COMPUTE]
    marks = [*clock.marks, ("", end)]
    phases = {name: stop - at for (name, at), (_, stop) in pairwise(marks)}
    return Timing(end, phases, dict(clock.spent), dict(clock.collectives), clock.crossing)


def kernel_seconds(gpu: Gpu, event: Event) -> float:
    """Of one kernel, on an otherwise idle GPU."""
    if event.operator in gpu.measured:
        return gpu.measured[event.operator]
    if event.name == "bus":
        return event.num_bytes / (1e9 * gpu.bus_gbps)
    moving = event.num_bytes / (1e9 * gpu.memory_gbps * gpu.memory_share)
    share = gpu.attention_share if event.name == "attention" else gpu.matmul_share
    rate = gpu.vector_tflops if event.wide else gpu.matmul_tflops
    return max(event.flops / (1e12 * rate * share), moving, gpu.kernel_us / 1e6)


def _group(cluster: Cluster, event: Event) -> tuple[int, int, int]:
    """Ranks of a collective's group, how many of them are on one node, and on how many nodes they are. They follow each other."""
    ranks = event.ranks or cluster.world_size
    local = min(ranks, cluster.gpus_per_node)
    return ranks, local, ceil(ranks / local)


def sent_where(cluster: Cluster, event: Event) -> dict[str, float]:
    """Bytes that one rank sends, inside its node and to other nodes; the average over a node's ranks where rings cross."""
    world, local, _ = _group(cluster, event)
    if world <= local:
        return {"node": event.num_bytes, "network": 0.0}
    share = (world - local) / (world - 1) if "alltoall" in event.name else 1 / local
    outside = event.num_bytes * share
    return {"node": event.num_bytes - outside, "network": outside}


def collective_seconds(cluster: Cluster, event: Event) -> float:
    """Of one collective, on otherwise idle links."""
    gpu = cluster.gpu
    world, local, nodes = _group(cluster, event)
    if event.operator in gpu.measured:
        return gpu.measured[event.operator]
    if world == 1:
        return gpu.kernel_us / 1e6
    sent = sent_where(cluster, event)
    # Around a ring every rank sends as much inside the node as the whole ring does.
    inside = sent["node"] if "alltoall" in event.name else event.num_bytes
    inside *= local > 1
    moving = max(
        inside / (1e9 * gpu.node_gbps * gpu.link_share),
        sent["network"] / (1e9 / 8 * cluster.link_gbps * gpu.link_share),
    )
    within, between = local - 1, nodes - 1
    if "alltoall" in event.name:
        within, between = min(1, within), min(1, between)
    elif cluster.trees:
        within, between = ceil(log2(local)), ceil(log2(nodes))
    else:
        within = world - nodes
    rounds = 2 if "allreduce" in event.name else 1
    latency = gpu.collective_us + rounds * (within * gpu.node_us + between * gpu.network_us)
    return moving + latency / 1e6
