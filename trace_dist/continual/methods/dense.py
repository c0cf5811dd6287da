"""What dense training, task after task on one set of weights, has in common: ``full`` and ``lora``. In one process."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trace_dist.config import RunConfig
from trace_dist.continual.judge import Row
from trace_dist.continual.methods.base import Method
from trace_dist.models.loading import load_model
from trace_dist.train.learner import DenseLearner, Learner
from trace_dist.train.loop import TrainResult
from trace_dist.train.loss import autocast
from trace_dist.train.task import train_learner
from trace_dist.train.workbench import Stream
from trace_dist.utils import dist
from trace_dist.utils.files import load_tensors, save_tensors


class Dense(Method):
    """One set of weights of its own, whose trained parameters are the state between tasks."""

    masked = False
    on_ranks = False
    continues = True

    @classmethod
    def check(cls, name: str, cfg: RunConfig) -> None:
        if cfg.target.quantize != "none":
            raise ValueError(
                f"continual.methods={name!r}: trains dense weights, but target.quantize is {cfg.target.quantize}; "
                "remove the method"
            )

    @abstractmethod
    def prepare(self, module: Any) -> nn.Module:
        """The model that is trained, from the base; its parameters that require gradients are trained."""

    @cached_property
    def _models(self) -> tuple[nn.Module, int]:
        """The model, and the number of the base's parameters."""
        # in fp32 whatever the target's type: a bf16 copy without a master would stall; see `autocast`
        base: Any = load_model(self.setting.base, torch.float32)
        base = base.to(dist.local_device())
        total = sum(parameter.numel() for parameter in base.parameters())
        return self.prepare(base), total

    @property
    def module(self) -> Any:
        """The model."""
        return self._models[0]

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def learn(self, stream: Stream) -> TrainResult:
        with self.setting.training(self.name, stream.task.name) as options:
            return self._train(self._learner(self.lr), stream, rate=self.lr_field, **options)

    @contextmanager
    def trial(self, stream: Stream, part: Stream, lr: float) -> Iterator[Learner]:
        trained = self._trained()
        before = {name: parameter.detach().clone() for name, parameter in trained.items()}
        learner = self._learner(lr)
        try:
            self._train(learner, part, rate="race.grid", description=f"{self.name} at {lr:g}")
            yield learner
        finally:
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(before[name])
                    # where training diverged
                    parameter.grad = None

    def _learner(self, lr: float) -> DenseLearner:
        cfg = self.setting.cfg
        return DenseLearner(self.module, self._trained().values(), cfg.train, lr, cfg.target.dtype)

    def _train(self, learner: DenseLearner, stream: Stream, **options: Any) -> TrainResult:
        train = self.setting.cfg.train
        batches = self.setting.bench.batches([stream], train.batch_size)
        return train_learner(learner, batches, train, stream.steps, **options)

    def score(self) -> Row:
        with autocast(self.setting.cfg.target.dtype):
            return self.setting.judge.score(self.module)

    def facts(self) -> dict[str, Any]:
        trainable = sum(parameter.numel() for parameter in self._trained().values())
        return {"trainable": trainable, "density": trainable / self._models[1]}

    def state(self, folder: Path) -> None:
        save_tensors(folder / "weights.safetensors", self._trained(), {"format": "trace_dist.weights"})

    @torch.no_grad()
    def load_state(self, folder: Path) -> None:
        tensors, _ = load_tensors(folder / "weights.safetensors", "weights")
        for name, parameter in self._trained().items():
            parameter.copy_(tensors[name])
