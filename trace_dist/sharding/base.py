"""The seam between training and the library that shards the model.

A backend answers three questions about each parameter: which slice of the row-major flattened tensor every rank owns
(``views``), where this rank's slice lies in memory (``local``), and how gathered copies are made to agree after that slice
was changed in place (``refresh``). Everything above (gradients, optimizer, deltas, checkpoints) is written once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from trace_dist.utils import dist

if TYPE_CHECKING:
    from trace_dist.masks.format import Mask
    from trace_dist.sharding.compaction import Accumulate, Compactor, Support


@dataclass(frozen=True)
class PartitionView:
    """The half-open interval [start, stop) of a row-major flattened parameter that one rank owns."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Shard:
    """One rank's part of one parameter.

    Attributes:
        name: Hugging Face parameter name.
        shape: full shape.
        view: which part of the flattened parameter this is.
        local: [len(view)] the values, a 1-D view of the live storage.
    """

    name: str
    shape: tuple[int, ...]
    view: PartitionView
    local: Tensor


class ShardedModel(ABC):
    """A causal LM whose parameters are spread over the ranks of this job.

    Calling it runs the forward pass of ``module``. Every weight is frozen; ``attach(mask)`` makes the masked entries, and
    only those, receive gradients.
    """

    backend: str
    reduces_hooked_gradients = False
    """Whether a gradient that a hook catches is this rank's slice, already averaged over ranks."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.rank, self.world = dist.rank(), dist.world_size()
        self._compactor: Compactor | None = None
        for parameter in module.parameters():
            parameter.requires_grad_(False)

    @classmethod
    @abstractmethod
    def from_pretrained(cls, path: str, dtype: torch.dtype) -> ShardedModel:
        """Load a checkpoint; where there are several ranks none holds more than its own shard. Collective."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a parameter."""

    @abstractmethod
    def views(self, name: str) -> list[PartitionView]:
        """What every rank owns of a parameter, in rank order; together they tile it."""

    @abstractmethod
    def local(self, name: str) -> Tensor:
        """This rank's slice, 1-D, sharing storage with the model: writes to it change the model."""

    @abstractmethod
    def refresh(self, names: Iterable[str]) -> None:
        """Make gathered copies agree with slices that were changed in place. Collective."""

    @abstractmethod
    def full_parameter(self, name: str) -> Tensor | None:
        """The whole parameter on rank 0 (None elsewhere). Collective."""

    def after_backward(self) -> None:  # noqa: B027 - backends without leftovers need nothing here
        """Called after each backward pass. Collective."""

    @property
    def config(self) -> Any:
        """The transformers config of the model."""
        return self.module.config

    @property
    def device(self) -> torch.device:
        return dist.local_device()

    def names(self) -> list[str]:
        """Parameter names, tied parameters once."""
        return [name for name, _ in self.module.named_parameters()]

    def shard(self, name: str) -> Shard:
        """This rank's part of a parameter."""
        return Shard(name, self.shape(name), self.views(name)[self.rank], self.local(name))

    def shards(self) -> Iterator[Shard]:
        """This rank's parts of all parameters."""
        return (self.shard(name) for name in self.names())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def train(self, mode: bool = True) -> ShardedModel:
        self.module.train(mode)
        return self

    def eval(self) -> ShardedModel:
        return self.train(False)

    def attach(self, mask: Mask, accumulate: Accumulate | None = None) -> list[Support]:
        """Route gradients of the mask's entries into compact buffers; replaces a mask attached before.

        Args:
            mask: which entries.
            accumulate: takes each reduced gradient instead of the supports' buffers, which then hold nothing.

        Raises:
            ValueError: the mask is of another model, or the ranks hold different masks.
        """
        from trace_dist.sharding.compaction import Compactor

        self.detach()
        self._compactor = Compactor(self, mask, accumulate)
        return self._compactor.supports

    def detach(self) -> None:
        """Stop collecting gradients."""
        if self._compactor is not None:
            self._compactor.close()
            self._compactor = None

    def is_attached(self, supports: list[Support]) -> bool:
        """Whether these supports, from ``attach``, still receive gradients."""
        return self._compactor is not None and self._compactor.supports is supports

    def has_unreduced_gradients(self) -> bool:
        """Whether gradients were computed on this rank that ``backward`` did not see through (by ``loss.backward()``)."""
        return self._compactor is not None and self._compactor.has_unreduced

    def backward(self, loss: Tensor, reduction: Literal["mean", "sum"] = "mean") -> None:
        """Backward pass; adds the gradients of all ranks, on the mask's entries only, to the compact buffers. Collective.

        Args:
            loss: scalar of this rank.
            reduction: ``mean`` averages the ranks' losses, as data-parallel training does; ``sum`` adds them.

        Raises:
            ValueError: no mask is attached, or the reduction is unknown.
        """
        if self._compactor is None:
            raise ValueError("backward: no mask is attached; build MaskedAdamW(sharded, mask, ...) first")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"backward: reduction={reduction!r}: unknown; use 'mean' or 'sum'")
        self._compactor.run_backward(loss, 1.0 / self.world if reduction == "mean" else 1.0)
        self.after_backward()

    def full_state_dict(self) -> dict[str, Tensor]:
        """On rank 0 the whole model on the CPU under plain Hugging Face names (tied names share one tensor); elsewhere empty.

        Collective.
        """
        state: dict[str, Tensor] = {}
        by_id: dict[int, str] = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            if id(parameter) not in by_id:
                by_id[id(parameter)] = name
                full = self.full_parameter(name)
                if full is not None:
                    state[name] = full
            elif self.rank == 0:
                state[name] = state[by_id[id(parameter)]]
        persistent = self.module.state_dict().keys()  # on every rank: FSDP2 drops its gathered copies here
        if self.rank == 0:
            state |= {k: v.detach().cpu().clone() for k, v in self.module.named_buffers() if k in persistent}
        return state

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the whole model as an ordinary Hugging Face checkpoint, from rank 0. Collective."""
        state = self.full_state_dict()
        if self.rank == 0:
            # transformers asks each parameter for its shape; a sharded one has another, so save from an empty twin.
            with torch.device("meta"):
                twin = type(self.module)(self.module.config)
            twin.generation_config = self.module.generation_config
            twin.save_pretrained(folder, state_dict=state)
        dist.barrier()
