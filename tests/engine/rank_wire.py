"""One rank's check of the wire counter: every collective that a backend or a peer uses, with operands of known size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as td
from engine.cases import CASES, batches
from engine.comms import CountedComm
from engine.training import make_optimizer, refused, train_step

from trace_dist.profiling.wire import WireCounter
from trace_dist.sharding.zero3 import Zero3Model
from trace_dist.utils import dist

LENGTH = 12


def wire(out: Path) -> dict[str, Any]:
    """Bytes by collective; those of one masked step beside what the engine hands over; one that is not known."""
    world, rank = dist.world_size(), dist.rank()
    mine, all_of_it = torch.zeros(LENGTH), torch.zeros(world * LENGTH)
    calls = {
        "all_gather_into_tensor": lambda: td.all_gather_into_tensor(all_of_it, mine),
        "all_gather": lambda: td.all_gather([torch.zeros(LENGTH) for _ in range(world)], mine),
        "reduce_scatter_tensor": lambda: td.reduce_scatter_tensor(mine, all_of_it),
        "all_reduce": lambda: td.all_reduce(mine),
        "broadcast": lambda: td.broadcast(mine, 0),
        "message": lambda: _pass_on(mine, rank, world),
        "all_to_all": lambda: td.all_to_all_single(torch.empty(world * (rank + 1)), *_uneven(world, rank)),
    }
    found: dict[str, Any] = {}
    for name, call in calls.items():
        with WireCounter() as counter:
            call()
        found[name] = [counter.gathered, counter.reduced]
    found["step"] = _step()

    def unknown() -> None:
        with WireCounter():
            td.gather(mine, [torch.zeros(LENGTH) for _ in range(world)] if rank == 0 else None)

    found["unknown"] = refused(unknown)
    return found


def _pass_on(mine: torch.Tensor, rank: int, world: int) -> None:
    """Every rank to the next."""
    sending = td.isend(mine, (rank + 1) % world)
    td.irecv(torch.empty(LENGTH), (rank - 1) % world).wait()
    sending.wait()


def _uneven(world: int, rank: int) -> tuple[torch.Tensor, list[int], list[int]]:
    """Rank r receives r + 1 elements from everyone."""
    sizes = [r + 1 for r in range(world)]
    return torch.zeros(sum(sizes)), [rank + 1] * world, sizes


def _step() -> list[float]:
    case = CASES["element"]
    model = Zero3Model(case.model(), 0)
    model.comm = comm = CountedComm()
    optimizer = make_optimizer(case, model)
    batch = batches(case)[0]
    train_step(case, model, optimizer, batch)
    before = comm.bytes_sent
    with WireCounter() as counter:
        train_step(case, model, optimizer, batch)
    return [counter.sent["alltoall_base_"], comm.bytes_sent - before]
