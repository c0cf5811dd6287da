"""Backend ``single``: one process owns every parameter whole."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trace_dist.models.loading import load_model
from trace_dist.sharding.base import PartitionView, ShardedModel


class SingleModel(ShardedModel):
    """An ordinary model in one process.

    Raises:
        ValueError: started with more than one rank.
    """

    backend = "single"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        if self.world > 1:
            raise ValueError(
                f"backend='single': {self.world} ranks were started; use backend zero3, or start one process"
            )
        module.to(self.device)
        self._parameters = dict(module.named_parameters())

    @classmethod
    def from_pretrained(cls, path: str, dtype: torch.dtype) -> SingleModel:
        return cls(load_model(path, dtype))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._parameters[name].shape)

    def views(self, name: str) -> list[PartitionView]:
        return [PartitionView(0, self._parameters[name].numel())]

    def local(self, name: str) -> Tensor:
        return self._parameters[name].data.view(-1)

    def refresh(self, names: Iterable[str]) -> None:
        """Nothing is gathered, so nothing can be stale."""

    def full_parameter(self, name: str) -> Tensor:
        return self._parameters[name].detach().cpu().clone()
