"""Bytes of gathered parameters at every moment of a step, beside the shards that a rank keeps.

ZeRO-3 (DeepSpeed 0.19, ``partitioned_param_coordinator.py``), once the order of modules is known, from the second step
on: before each module it gathers what the module needs and then *prefetches* parameters in the order of use, up to
``stage3_prefetch_bucket_size`` elements (on a GPU a whole block at least) while fewer than ``stage3_max_live_parameters``
are gathered; parameters gathered together pass through one flat buffer that lives until the last of them is used. After a
module it frees those that do not come again within ``stage3_max_reuse_distance`` elements. So a model of less than that
is whole on every rank between forward and backward. How far away that is, DeepSpeed counts by the parameters of the
modules in between. Where it frees a decoder block, those are with the modules' children, and the whole model comes again
as soon as backward begins (sharding/zero3.py, [Note: whole blocks]); where it frees another module, they are without, and
blocks count nothing. A single rank gathers nothing: its shard is the parameter. On a CPU and among few ranks (``sequential``)
every parameter is gathered by itself, without a flat buffer (``stage3_allgather_sequential``).

FSDP2 gathers block by block: the root's group (embedding, last norm, head) stays from forward to backward; beside it lie the
block in use and the flat buffer of the next one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from trace_dist.profiling.activations import Moment
from trace_dist.sharding.zero3 import (
    PERSISTENCE_THRESHOLD,
    gathers_one_by_one,
    max_reuse_distance,
    prefetch_bucket,
)


@dataclass(frozen=True)
class Zero3Limits:
    """DeepSpeed's defaults, in elements, but for those that ``sharding.zero3`` sets."""

    max_live: int = 10**9
    max_reuse_distance: int = max_reuse_distance(whole=True)
    prefetch_bucket: int = prefetch_bucket(0)
    persistence_threshold: int = PERSISTENCE_THRESHOLD


@dataclass
class _Zero3:
    """The coordinator's state; counts are elements."""

    numel: Mapping[str, int]
    order: Sequence[Moment]  # those that fetch
    limits: Zero3Limits
    sequential: bool = False
    step: int = 0
    live: int = 0  # what DeepSpeed counts
    held: int = 0  # what is really allocated
    available: set[str] = field(default_factory=set)
    bucket_of: dict[str, list[str]] = field(default_factory=dict)  # in flight -> what was gathered with it
    last_use: dict[str, int] = field(default_factory=dict)  # as far as the prefetcher has looked

    def __post_init__(self) -> None:
        self.queue = deque(
            (name, step) for step, moment in enumerate(self.order) for name in moment.fetches or ()
        )
        self.ahead = {whole: _Ahead.of(self.order, self.numel, whole) for whole in (True, False)}

    def persists(self, name: str) -> bool:
        return self.numel[name] <= self.limits.persistence_threshold

    def fetch(self, names: Sequence[str]) -> int:
        """Gather what a module needs, then prefetch; returns the most elements allocated meanwhile."""
        names = [name for name in names if not self.persists(name)]
        self._gather([name for name in names if name not in self.available and name not in self.bucket_of])
        peak = self.held
        for name in names:
            peak = max(peak, self._wait(name))
        self._drop_from_queue([name for name in names if self.last_use.get(name, -1) < self.step])
        room = min(self.limits.max_live - self.live, self.limits.prefetch_bucket)
        ahead: list[str] = []
        while self.queue and sum(self.numel[name] for name in ahead) < room:
            name, step = self.queue.popleft()
            self.last_use[name] = max(self.last_use.get(name, -1), step)
            if name not in self.available and name not in self.bucket_of and name not in ahead:
                ahead += [] if self.persists(name) else [name]
        self._gather(ahead)
        self.step += 1
        return max(peak, self.held)

    def _drop_from_queue(self, names: Sequence[str]) -> None:
        missing = set(names)
        while self.queue and missing:
            name, step = self.queue.popleft()
            self.last_use[name] = step
            missing.discard(name)

    def _gather(self, names: list[str]) -> None:
        for name in names:
            self.bucket_of[name] = names
            self.live += self.numel[name]
            self.held += self.numel[name]

    def _wait(self, name: str) -> int:
        """A bucket's first use copies all of it out of the flat buffer, which its last use frees; returns the elements held."""
        bucket = self.bucket_of.pop(name, None)
        if bucket is None:
            return self.held
        size = 0 if self.sequential or len(bucket) == 1 else sum(self.numel[other] for other in bucket)
        if name not in self.available:
            self.held += size
        self.available.update(bucket)
        held = self.held
        if not any(other in self.bucket_of for other in bucket):
            self.held -= size
        return held

    def release(self, moment: Moment) -> None:
        for name in moment.releases:
            if self.persists(name) or name not in self.available or name in self.bucket_of:
                continue
            if self.last_use.get(name, -1) > self.step or self._comes_again(name, moment.whole):
                continue
            self.available.discard(name)
            self.live -= self.numel[name]
            self.held -= self.numel[name]

    def _comes_again(self, name: str, whole: bool) -> bool:
        distance = self.ahead[whole].distance(name, self.step)
        return distance is not None and distance < self.limits.max_reuse_distance


class _Ahead(NamedTuple):
    """The steps ahead as DeepSpeed sees them when it frees a whole block, or another module."""

    passed: list[int]  # elements before each step
    uses: dict[str, list[int]]

    @classmethod
    def of(cls, order: Sequence[Moment], numel: Mapping[str, int], whole: bool) -> _Ahead:
        uses: dict[str, list[int]] = {}
        sizes = []
        for step, moment in enumerate(order):
            own = () if moment.whole else moment.fetches or ()
            everything = numel if moment.whole else ()  # of the model itself, which fetches nothing
            names: Iterable[str] = (moment.fetches or everything) if whole else own
            for name in names:
                uses.setdefault(name, []).append(step)
            sizes.append(sum(numel[name] for name in names))
        return cls([0, *accumulate(sizes)], uses)

    def distance(self, name: str, step: int) -> int | None:
        """Elements from a step to the next use of a parameter; None if there is none."""
        uses = self.uses.get(name, [])
        following = bisect_left(uses, step)
        return None if following == len(uses) else self.passed[uses[following]] - self.passed[step]


def zero3_gathered(
    moments: Sequence[Moment],
    numel: Mapping[str, int],
    world_size: int,
    by_messages: bool = False,
    limits: Zero3Limits | None = None,
) -> list[int]:
    """Elements gathered on a rank at each moment of a step, persistent parameters included.

    Args:
        moments: of one step.
        numel: elements of every parameter.
        world_size: ranks.
        by_messages: whether the ranks are CPUs.
        limits: DeepSpeed's options; those of masked training when None.
    """
    if world_size == 1:
        return [0] * len(moments)
    if limits is None:
        blocks = [sum(map(numel.__getitem__, m.fetches)) for m in moments if m.whole and m.fetches]
        limits = Zero3Limits(
            max_reuse_distance=max_reuse_distance(bool(blocks)),
            prefetch_bucket=prefetch_bucket(0 if by_messages else max(blocks, default=0)),
        )
    order = [moment for moment in moments if moment.fetches is not None]
    state = _Zero3(numel, order, limits, gathers_one_by_one(world_size, by_messages))
    kept = sum(size for size in numel.values() if size <= limits.persistence_threshold)
    gathered = []
    for moment in moments:
        state.release(moment)
        gathered.append(kept + (state.held if moment.fetches is None else state.fetch(moment.fetches)))
    return gathered


def fsdp2_gathered(
    moments: Sequence[Moment], numel: Mapping[str, int], groups: Mapping[str, int | None]
) -> list[int]:
    """Elements gathered on a rank at each moment of a step.

    Args:
        moments: of one step.
        numel: elements of every parameter.
        groups: parameter -> number of its block, or None for the root's group.
    """
    sizes: dict[int | None, int] = {}
    for name, size in numel.items():
        sizes[groups[name]] = sizes.get(groups[name], 0) + size
    visits: list[int | None] = []
    for moment in moments:
        names = (*(moment.fetches or ()), *moment.releases)
        visits.append(groups[names[0]] if names else visits[-1] if visits else None)
    gathered: list[int] = []
    current: int | None = None
    following: int | None = None
    for block in reversed(visits):
        if block != current and current is not None:
            following = current
        current = block
        parts = {group for group in (block, following) if group is not None}
        gathered.append(sizes.get(None, 0) + sum(sizes[group] for group in parts))
    return gathered[::-1]
