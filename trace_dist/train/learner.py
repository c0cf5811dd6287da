"""What the training loop drives: a model, its backward pass and its optimizer step.

``MaskedLearner`` trains a mask on a sharded model. ``DenseLearner`` trains ordinary parameters in one process: pretraining of
tiny bases, warm starts of the probe, full fine-tuning and LoRA.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trace_kernels.compact import compact_gather

from trace_dist.checkpoint import (
    Write,
    load_best,
    load_best_dense,
    load_checkpoint,
    load_dense,
    save_checkpoint,
    save_dense,
    write_checkpoint,
)
from trace_dist.checkpoint.retention import KEEP
from trace_dist.config import TrainConfig
from trace_dist.data.batches import Step
from trace_dist.masks.mask import Mask
from trace_dist.optim.masked_adamw import MaskedAdamW
from trace_dist.optim.states import tensors_of
from trace_dist.sharding.base import ShardedModel
from trace_dist.train.loss import accumulate, autocast
from trace_dist.utils import dist
from trace_dist.utils.finite import check_finite


class Learner(ABC):
    """A model that can learn. ``optimizer`` is a torch optimizer, for the learning-rate schedule."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    model: ShardedModel | None = None
    """The module on its ranks; None in one process."""
    best: dict[str, Tensor] | None = None
    """Values of an earlier step, which ``keep_best`` kept, in host memory; checkpoints hold them too."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of ``loss``, summed over ranks."""

    @abstractmethod
    def step(self) -> float:
        """Update, reset gradients, and return the global gradient norm before clipping.

        Raises:
            NotFinite: the norm is infinite or NaN; on all ranks together, and nothing has changed.
        """

    def discard(self) -> None:
        """Forget the gradients of a step that is not taken."""
        self.optimizer.zero_grad()

    def ranks_not_finite(self) -> list[int]:
        """The ranks whose gradient was infinite or NaN, as far as that can be told. Collective."""
        return []

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """What an update changes on this rank: weights, master copies, moments."""

    @abstractmethod
    def values(self) -> dict[str, Tensor]:
        """What is trained on this rank, in full precision, by parameter."""

    @abstractmethod
    def put(self, values: dict[str, Tensor]) -> None:
        """Make the model hold what ``values`` gave, wherever that lies now; moments stay. Collective."""

    def keep_best(self) -> None:
        """Keep a copy of the present values in host memory, in place of an earlier one."""
        self.best = {name: value.detach().to("cpu", copy=True) for name, value in self.values().items()}

    def put_best(self) -> None:
        """Make the model hold the values that were kept. Collective."""
        if self.best is None:
            raise AssertionError("no values were kept")
        self.put(self.best)

    @abstractmethod
    def save(
        self, root: Path, step: int, state: dict[str, Any], keep: int = KEEP, write: Write = write_checkpoint
    ) -> object:
        """Write a checkpoint of weights and optimizer after some steps. Collective.

        Args:
            root: folder of checkpoints, of which ``keep`` stay.
            step: optimizer steps done.
            state: JSON-ready state of everything else.
            write: what writes.
        """

    @abstractmethod
    def load(self, folder: Path) -> dict[str, Any]:
        """Continue from a checkpoint that ``save`` wrote; its manifest (``step``, ``state``). Collective."""

    def forward(self, **inputs: Tensor) -> Any:
        """Run the model on the inputs of a micro-batch."""
        return self.module(**inputs)

    def accumulate(self, step: Step) -> Tensor:
        """Accumulate the gradients of a step; this rank's part of the loss (``loss.accumulate``)."""
        return accumulate(step, self.forward, self.backward, self.device)

    @property
    def device(self) -> torch.device:
        return dist.local_device()


class MaskedLearner(Learner):
    """Masked training of a sharded model."""

    optimizer: MaskedAdamW
    model: ShardedModel

    def __init__(
        self,
        model: ShardedModel,
        mask: Mask,
        cfg: TrainConfig,
        lr: float | None = None,
        scale: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.module = model, model.module
        self.optimizer = MaskedAdamW(
            model,
            mask,
            lr=cfg.rate if lr is None else lr,
            betas=cfg.betas,
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
            max_grad_norm=cfg.max_grad_norm,
            state_dtype=cfg.state_dtype,
            master=cfg.master,
            offload=cfg.offload,
            scale=scale,
            check_first=True,
        )

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss, reduction="sum")

    def step(self) -> float:
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.optimizer.grad_norm

    def ranks_not_finite(self) -> list[int]:
        return self.model.ranks_not_finite()

    def tensors(self) -> Iterator[Tensor]:
        for support, state in self.optimizer.compact():
            yield compact_gather(*self.model.storage(support))
            yield from tensors_of(state).values()

    def values(self) -> dict[str, Tensor]:
        return {support.name: self.optimizer.values(support) for support in self.optimizer.supports}

    def put(self, values: dict[str, Tensor]) -> None:
        self.optimizer.set_values([values[support.name] for support in self.optimizer.supports])

    def save(
        self, root: Path, step: int, state: dict[str, Any], keep: int = KEEP, write: Write = write_checkpoint
    ) -> object:
        return save_checkpoint(root, step, self.optimizer, state, keep, self.best, write)

    def load(self, folder: Path) -> dict[str, Any]:
        manifest = load_checkpoint(folder, self.optimizer)
        self.best = load_best(folder, manifest, self.optimizer)
        return manifest


class DenseLearner(Learner):
    """Ordinary AdamW over the given fp32 parameters, in one process; ``dtype`` is that of matmuls (mixed precision).

    ``penalise`` adds to the gradients of a step, before they are clipped.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Iterable[nn.Parameter],
        cfg: TrainConfig,
        lr: float | None = None,
        dtype: str = "float32",
        penalise: Callable[[], None] | None = None,
    ) -> None:
        self.module, self.dtype, self._penalise = module.to(self.device), dtype, penalise
        self.parameters = list(parameters)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.max_grad_norm = cfg.max_grad_norm
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=cfg.rate if lr is None else lr,
            betas=cfg.betas,
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
            fused=True,
        )

    def forward(self, **inputs: Tensor) -> Any:
        with autocast(self.dtype):
            return super().forward(**inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> float:
        if self._penalise is not None:
            self._penalise()
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        check_finite(norm, "the gradient norm")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def tensors(self) -> Iterator[Tensor]:
        yield from self.parameters
        for state in self.optimizer.state.values():
            yield from state.values()

    def values(self) -> dict[str, Tensor]:
        return dict(self._named())

    @torch.no_grad()
    def put(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._named():
            parameter.copy_(values[name])

    def save(
        self, root: Path, step: int, state: dict[str, Any], keep: int = KEEP, write: Write = write_checkpoint
    ) -> object:
        return save_dense(root, step, self._named(), self.optimizer, state, keep, self.best, write)

    def load(self, folder: Path) -> dict[str, Any]:
        manifest = load_dense(folder, self._named(), self.optimizer)
        self.best = load_best_dense(folder, manifest, self._named())
        return manifest

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        """What is trained, with its names in the model."""
        trained = set(map(id, self.parameters))
        return [(name, each) for name, each in self.module.named_parameters() if id(each) in trained]
