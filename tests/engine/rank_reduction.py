"""One rank's checks of the compact reduction: sums in several orders of arrival, bytes on the wire."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from engine.cases import CASES, batches
from engine.comms import CountedComm
from torch import Tensor

from trace_dist import Mask
from trace_dist.sharding.comm import Comm
from trace_dist.sharding.reduction import CompactReducer
from trace_dist.sharding.support import Support, build_supports
from trace_dist.sharding.zero3 import Zero3Model
from trace_dist.utils import dist

CPU = torch.device("cpu")


def reduction(out: Path) -> dict[str, Any]:
    """Sums over ranks in several orders of arrival; bytes on the wire."""
    model = Zero3Model(CASES["element-everything"].model(), 0)
    supports = build_supports(model, Mask.random(model, 0.3, "element", seed=1, maskable="all"))
    for support in supports:
        support.grad = torch.zeros(support.runs.num_entries)
    rank, world = dist.rank(), dist.world_size()
    base = {s.name: torch.arange(s.num_entries, dtype=torch.float32) for s in supports}

    def contribution(name: str, of_rank: int) -> Tensor:
        return (base[name] % 13 + 1) * 10**of_rank  # integers: sums are exact

    backwards = list(reversed(supports))
    orders = {
        "in order": lambda _: backwards,
        "reversed": lambda _: supports,
        "twice": lambda _: backwards + backwards[::3],
        "missing on the last rank": lambda r: [s for i, s in enumerate(backwards) if r < world - 1 or i % 3],
        "missing everywhere": lambda _: backwards[::2],
        "late on the last rank": lambda r: backwards[1:] + backwards[:1] if r == world - 1 else backwards,
    }
    found: dict[str, Any] = {}
    for bucket_bytes in (64, 2000, 2**25):
        reducer = CompactReducer(supports, lambda s, values: s.grad.add_(values), Comm(), CPU, bucket_bytes)
        for name, order in orders.items():
            for support in supports:
                support.grad.zero_()
            for _ in range(2):  # a second backward adds to the first
                for support in order(rank):
                    reducer.add(support, contribution(support.name, rank))
                reducer.finish([])
            wrong = 0
            for s in supports:
                whole = sum(order(r).count(s) * contribution(s.name, r) for r in range(world))
                whole = torch.as_tensor(whole, dtype=torch.float32).expand(s.num_entries)
                wrong += not torch.equal(s.grad, 2 * whole[s.offset : s.offset + s.runs.num_entries])
            found[f"{name}/{bucket_bytes}"] = wrong
    found["unreduced"] = reducer.has_unreduced
    found["under way"] = exchanges_under_way([s for s in supports if 0 not in s.splits])
    found["bytes"] = {d: bytes_of_one_backward(d) for d in (0.05, 1.0)}
    return found


def exchanges_under_way(supports: list[Support]) -> list[bool]:
    """Whether each of two gradients, in buckets of their own, has been added up after the first, the second, and the end.

    What was sent has arrived before the next gradient comes.
    """
    reducer = CompactReducer(supports, lambda s, values: s.grad.add_(values), Comm(), CPU, bucket_bytes=1)
    for support in supports:
        support.grad.zero_()
    arrived, last_two = [], supports[:-3:-1]
    for support in last_two:
        reducer.add(support, torch.ones(support.num_entries))
        arrived += [bool(s.grad.all()) for s in last_two]
        while not all(exchange.work.is_completed() for exchange in reducer._in_flight):
            time.sleep(0.01)
    reducer.finish([])
    return arrived + [bool(s.grad.all()) for s in last_two]


def bytes_of_one_backward(density: float) -> int:
    """What this rank sends for the gradients of the linear layers."""
    case = CASES["element"]
    model = Zero3Model(case.model(), 0)
    model.comm = comm = CountedComm()
    model.attach(Mask.random(model, density, "element", seed=1))
    model.backward(model(input_ids=batches(case)[0][0]).logits.square().mean())
    return comm.bytes_sent
