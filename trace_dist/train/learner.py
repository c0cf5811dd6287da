"""What the training loop drives: a model, its backward pass and its optimizer step.

``MaskedLearner`` trains a mask on a sharded model. ``DenseLearner`` trains ordinary parameters in one process: pretraining of
tiny bases, warm starts of the probe, and the baselines (full fine-tuning, LoRA).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trace_dist.config import TrainConfig
from trace_dist.masks.format import Mask
from trace_dist.optim.masked_adamw import MaskedAdamW
from trace_dist.sharding.base import ShardedModel


class Learner(ABC):
    """A model that can learn. ``optimizer`` is a torch optimizer, for the learning-rate schedule."""

    module: nn.Module
    optimizer: torch.optim.Optimizer

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of ``loss``, summed over ranks."""

    @abstractmethod
    def step(self) -> float:
        """Update, reset gradients, and return the global gradient norm before clipping."""

    def forward(self, batch: dict[str, Tensor]) -> Any:
        """Run the model on one micro-batch, without its labels."""
        return self.module(**{key: value for key, value in batch.items() if key != "labels"})


class MaskedLearner(Learner):
    """Masked training of a sharded model."""

    optimizer: MaskedAdamW

    def __init__(self, model: ShardedModel, mask: Mask, cfg: TrainConfig, lr: float | None = None) -> None:
        self.model, self.module = model, model.module
        self.optimizer = MaskedAdamW(
            model,
            mask,
            lr=cfg.lr if lr is None else lr,
            betas=cfg.betas,
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
            max_grad_norm=cfg.max_grad_norm,
        )

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss, reduction="sum")

    def step(self) -> float:
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.optimizer.grad_norm


class DenseLearner(Learner):
    """Ordinary AdamW over the given parameters, in one process."""

    def __init__(
        self, module: nn.Module, parameters: Iterable[nn.Parameter], cfg: TrainConfig, lr: float | None = None
    ) -> None:
        self.module = module
        self.parameters = list(parameters)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.max_grad_norm = cfg.max_grad_norm
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=cfg.lr if lr is None else lr,
            betas=cfg.betas,
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
        )

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> float:
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)
