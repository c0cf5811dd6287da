"""Whole weights on every rank: backend ``single`` (one process), and what plain or DDP models run on (``prepared``).

[Note: replicated] Every rank holds every weight, but each owns one interval of each parameter: gradients, optimizer states and
the update exist for the masked entries in it alone, and ``refresh`` sends the new values to the other ranks: only
masked entries travel in either direction (ZeRO stage 2 on a mask).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from trace_kernels.compact import compact_gather, compact_scatter

from trace_dist.config import Quantize
from trace_dist.sharding.base import ShardedModel
from trace_dist.sharding.reduction import bucket_bytes_for, cut_buckets
from trace_dist.sharding.support import Support
from trace_dist.sharding.views import PartitionView
from trace_dist.utils import dist


class ReplicatedModel(ShardedModel):
    """A model that every rank holds whole, on the device where it is.

    Args:
        module: an ordinary model with the same values on every rank.
    """

    backend = "replicated"
    weights_in_sight = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._views: dict[str, list[PartitionView]] = {}  # asked for at every step

    @classmethod
    def from_pretrained(cls, path: str, dtype: torch.dtype, quantize: Quantize = "none") -> ReplicatedModel:
        # Slow to import: it brings the architectures of transformers, and a command on a bank needs none.
        from trace_dist.models.loading import load_model

        return cls(load_model(path, dtype, quantize))

    @property
    def device(self) -> torch.device:
        return next(iter(self._parameters.values())).device

    def views(self, name: str) -> list[PartitionView]:
        if name not in self._views:
            numel = prod(self.shape(name))
            edges = [numel * rank // self.world for rank in range(self.world + 1)]
            self._views[name] = [PartitionView(start, stop) for start, stop in pairwise(edges)]
        return self._views[name]

    def local(self, name: str) -> Tensor:
        view = self.views(name)[self.rank]
        return self._parameters[name].data.view(-1)[view.start : view.stop]

    def places(self, supports: Iterable[Support]) -> list[int] | None:
        # The start of this rank's interval does not change: no view has to be made.
        return (
            None if self._quantized else [self._parameters[support.name].data_ptr() for support in supports]
        )

    def refresh(self, supports: Iterable[Support]) -> None:
        """Every rank receives what the others changed in their intervals."""
        if self.world == 1:
            return
        kinds: dict[torch.dtype, list[Support]] = {}
        for support in self.dense(supports):
            kinds.setdefault(self._parameters[support.name].dtype, []).append(support)
        for dtype, alike in kinds.items():
            sizes = [support.num_entries * dtype.itemsize for support in alike]
            for bucket in cut_buckets(sizes, bucket_bytes_for(self.world)):
                self._share([alike[place] for place in bucket])

    def _share(self, supports: list[Support]) -> None:
        """One collective for some parameters of one dtype."""
        weights = [self._parameters[support.name].data.view(-1) for support in supports]
        mine = [
            compact_gather(self.local(support.name), support.runs).to(weight.dtype)
            for support, weight in zip(supports, weights, strict=True)
        ]
        splits = [[support.splits[rank] for support in supports] for rank in range(self.world)]
        everyone = self.comm.all_gather(torch.cat(mine), list(map(sum, splits)))
        parts = [
            part.split(sizes)
            for part, sizes in zip(everyone.split(list(map(sum, splits))), splits, strict=True)
        ]
        for place, (support, weight) in enumerate(zip(supports, weights, strict=True)):
            compact_scatter(weight, support.whole(), torch.cat([part[place] for part in parts]))

    @contextmanager
    def gathered(self, parameters: list[Any]) -> Iterator[list[Tensor]]:
        yield [parameter.data for parameter in parameters]


class SingleModel(ReplicatedModel):
    """An ordinary model in one process, moved to this process's device.

    Raises:
        ValueError: started with more than one rank.
    """

    backend = "single"

    def __init__(self, module: nn.Module) -> None:
        if dist.world_size() > 1:
            raise ValueError(
                f"backend='single': {dist.world_size()} ranks were started; use backend zero3 or fsdp2, or start one process"
            )
        super().__init__(module.to(dist.local_device()))
