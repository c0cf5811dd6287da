"""Which interval of each flattened parameter every rank owns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod


@dataclass(frozen=True)
class PartitionView:
    """The half-open interval [start, stop) of a row-major flattened parameter that one rank owns."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@lru_cache(maxsize=256)
def flat_views(numel: int, size: int, world: int) -> list[PartitionView]:
    """Every rank's view where the flattened parameter is cut after each ``size`` elements, as ZeRO-3 does. Not to be changed.

    They are asked for at every step, and a model's parameters have few shapes.
    """
    return [PartitionView(min(r * size, numel), min((r + 1) * size, numel)) for r in range(world)]


def chunk_views(shape: Sequence[int], world: int) -> list[PartitionView]:
    """Every rank's view where dimension 0 is cut into chunks as by ``torch.chunk``, as FSDP2 does."""
    rows, *rest = shape
    return flat_views(prod(shape), -(-rows // world) * prod(rest), world)
