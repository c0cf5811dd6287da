"""One rank's part of a job in which another lacks a gradient, while weights are gathered: in which group what travels."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from trace_dist import Mask, MaskedAdamW, shard
from trace_dist.sharding import compaction
from trace_dist.sharding.reduction import CompactReducer
from trace_dist.utils import dist

WIDTH = 8
NAMES = {"gather": "default"}
GROUPS = ("default", "exchange", "indices")


class Part(nn.Module):
    """A block whose second layer is left out at times, as an expert to which no token goes."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, skip: bool) -> Tensor:
        h = torch.tanh(self.always(x))
        return h if skip else h + self.sometimes(h)


class Parts(nn.Module):
    """Three blocks, each gathered as one."""

    _no_split_modules = ("Part",)

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.parts = nn.ModuleList(Part() for _ in range(3))

    def forward(self, x: Tensor, skip: bool) -> Tensor:
        for place, part in enumerate(self.parts):
            x = part(x, skip and place > 0)
        return x


class CollectiveLog(TorchDispatchMode):
    """(group, operation, elements) of every collective and message of the thread that computes, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            flat = tree_flatten((args, kwargs))[0]
            group = next(td.ProcessGroup.unbox(each) for each in flat if isinstance(each, torch.ScriptObject))
            given = [each.numel() for each in flat if isinstance(each, Tensor)][-1]  # the same on every rank
            self.log.append((NAMES.get(dist.lane_of(group), dist.lane_of(group)), func._opname, given))
        return func(*args, **(kwargs or {}))


def trained(backend: str, ranks: range) -> tuple[list[tuple[str, str, int]], dict[str, list[float]]]:
    """What was called while two steps were trained, and the weights afterwards.

    Args:
        backend: of the model.
        ranks: whose batches this process sees; the last rank of two leaves layers out.
    """
    model = shard(Parts(), backend)
    small_buckets = partial(CompactReducer, bucket_bytes=1)
    with patch.object(compaction, "CompactReducer", small_buckets):
        optimizer = MaskedAdamW(model, Mask.random(model, 0.5, "element", seed=3), lr=1e-2, eps=1e-5)
    generator = torch.Generator().manual_seed(2)
    with CollectiveLog() as log:
        for _ in range(2):
            inputs = [torch.randn(3, WIDTH, generator=generator) for _ in range(2)]
            for rank in ranks:
                loss = (model(inputs[rank % 2], skip=rank == 1) - 1).square().mean()
                model.backward(loss / len(ranks))
            optimizer.step()
            optimizer.zero_grad()
    return log.log, {name: value.flatten().tolist() for name, value in model.full_state_dict().items()}


def withheld(out: Path) -> dict[str, Any]:
    """By backend: the log of every group, and the weights."""
    found = {}
    for backend in ("zero3", "fsdp2"):
        found[backend] = logged(*trained(backend, range(dist.rank(), dist.rank() + 1)))
    return found


def logged(log: list[tuple[str, str, int]], weights: dict[str, list[float]]) -> dict[str, Any]:
    """What ``trained`` found, by group."""
    return {
        "log": {group: [each[1:] for each in log if each[0] == group] for group in GROUPS},
        "weights": weights,
    }
