"""One rank's check of the all-gather over gloo: against torch's, with several under way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as td
from engine.cases import CASES, batches
from engine.training import make_optimizer, refused, train_step
from torch import Tensor

from trace_dist.profiling.wire import WireCounter
from trace_dist.sharding import gloo
from trace_dist.sharding.fsdp2 import Fsdp2Model
from trace_dist.sharding.zero3 import Zero3Model
from trace_dist.utils import dist

SIZES = (1, 7, 0, 100_003, 64)
DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.float64)


def gathering_over_gloo(out: Path) -> dict[str, Any]:
    """Wrong results by kind of call, the refusals, and which collectives a step of each backend calls."""
    world = dist.world_size()
    pair = td.new_group([0, world - 1])
    shards = [_shard(size, dtype) for size in SIZES for dtype in DTYPES]
    found: dict[str, Any] = {"under way": _wrong(shards, None), "own place": _wrong_in_place(shards)}
    if dist.rank() in (0, world - 1):
        found["group"] = _wrong(shards, pair)
    found["size"] = refused(lambda: gloo.all_gather(torch.empty(2 * world), torch.empty(3)))
    found["dtype"] = refused(lambda: gloo.all_gather(torch.empty(3 * world), torch.empty(3).double()))
    found["steps"] = [_collectives(backend) for backend in (Zero3Model, Fsdp2Model)]
    return found


def _shard(size: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-99, 99, (size,)).add(dist.rank()).to(dtype)


def _expected(shard: Tensor, group: Any) -> Tensor:
    everyone = [torch.empty_like(shard) for _ in range(td.get_world_size(group))]
    td.all_gather(everyone, shard, group=group)
    return torch.cat(everyone)


def _wrong(shards: list[Tensor], group: Any) -> int:
    """All are started before any is waited for, the last one first."""
    ranks = td.get_world_size(group)
    outputs = [shard.new_full((ranks * len(shard),), 77) for shard in shards]
    works = [gloo.all_gather(o, s, group, async_op=True) for o, s in zip(outputs, shards, strict=True)]
    for work in reversed(works):
        assert work is not None
        work.wait()
    return sum(not torch.equal(o, _expected(s, group)) for o, s in zip(outputs, shards, strict=True))


def _wrong_in_place(shards: list[Tensor]) -> int:
    """The shard lies where it belongs in the output, as FSDP2 has it."""
    wrong = 0
    for shard in shards:
        output = shard.new_full((dist.world_size(), len(shard)), 77)
        output[dist.rank()] = shard
        gloo.all_gather(output, output[dist.rank()])
        wrong += not torch.equal(output.flatten(), _expected(shard, None))
    return wrong


def _collectives(backend: type[Zero3Model] | type[Fsdp2Model]) -> list[str]:
    case = CASES["element"]
    model = backend(case.model())
    optimizer = make_optimizer(case, model)
    with WireCounter() as counter:
        train_step(case, model, optimizer, batches(case)[0])
    return sorted(counter.sent)
