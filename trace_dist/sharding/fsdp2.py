"""Backend ``fsdp2``: torch's ``fully_shard`` cuts dimension 0 of every parameter into chunks, one per rank.

A rank's chunk is the local tensor of a DTensor; it is contiguous, so it is one interval of the flattened parameter and is updated
in place. Frozen linear weights are gathered for backward and never reduced (``masked_linear`` delivers their compact
gradients); a parameter that a hook catches has been reduced by FSDP2 already, as the mean over ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from trace_dist.models.loading import load_model_fsdp2
from trace_dist.sharding.base import PartitionView, ShardedModel
from trace_dist.utils import dist


def _wrap(module: nn.Module) -> None:
    """Shard every decoder block as one group, and what is left as the root's."""
    mesh = init_device_mesh(dist.local_device().type, (dist.world_size(),))
    blocks = set(getattr(module, "_no_split_modules", None) or ())
    for child in list(module.modules()):
        if type(child).__name__ in blocks:
            fully_shard(child, mesh=mesh)
    fully_shard(module, mesh=mesh)


class Fsdp2Model(ShardedModel):
    """A model sharded by FSDP2.

    Args:
        module: an ordinary model, sharded now unless it is already.
    """

    backend = "fsdp2"
    reduces_hooked_gradients = True

    def __init__(self, module: nn.Module) -> None:
        dist.ensure_group()
        if not isinstance(module, FSDPModule):
            module.to(dist.local_device())
            _wrap(module)
        super().__init__(module)
        # The first unshard settles where the shards live; `local` may be kept from then on.
        self.module.unshard()
        self.module.reshard()
        self._parameters: dict[str, Any] = dict(module.named_parameters())

    @classmethod
    def from_pretrained(cls, path: str, dtype: torch.dtype) -> Fsdp2Model:
        """Load a checkpoint so that no rank ever holds more than its own shard."""
        dist.ensure_group()
        return cls(load_model_fsdp2(path, dtype, _wrap, dist.local_device()))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._parameters[name].shape)

    def views(self, name: str) -> list[PartitionView]:
        rows, *rest = self.shape(name)
        row = torch.Size(rest).numel()
        chunk = -(-rows // self.world)
        edges = [min(r * chunk, rows) * row for r in range(self.world + 1)]
        return [PartitionView(start, stop) for start, stop in pairwise(edges)]

    def local(self, name: str) -> Tensor:
        return self._parameters[name].data.to_local().view(-1)

    def refresh(self, names: Iterable[str]) -> None:
        """The root group stays gathered after a forward pass without backward; drop every gathered copy."""
        for child in self.module.modules():
            if isinstance(child, FSDPModule):
                child.reshard()

    def full_parameter(self, name: str) -> Tensor | None:
        full = self._parameters[name].full_tensor()
        return full.detach().cpu() if self.rank == 0 else None
