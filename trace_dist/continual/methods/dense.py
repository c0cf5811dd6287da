"""What dense training in one process has in common: ``full``, ``lora`` and the methods that they are compared with.

[Note: hooks of dense training] A task is ``begin``, the training, ``end``. A penalty adds its gradient in ``penalise``, before
the gradients are clipped: it is a part of the loss. What is kept of earlier tasks beside the weights is in ``memory``. A training
that was cut goes on from its checkpoint after ``begin``, once more; so both hooks leave the random numbers as they are.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trace_dist.config import RunConfig
from trace_dist.continual.judge import Row
from trace_dist.continual.methods.base import Method
from trace_dist.continual.methods.options import Replayed, replaying
from trace_dist.continual.setting import Setting
from trace_dist.data.batches import Batches
from trace_dist.data.tasks import Task
from trace_dist.models.loading import load_model
from trace_dist.profiling.memory_setup import MemorySetup
from trace_dist.profiling.speed import dense_flops
from trace_dist.train.learner import DenseLearner, Learner
from trace_dist.train.loop import TrainResult
from trace_dist.train.loss import autocast
from trace_dist.train.task import train_learner
from trace_dist.train.workbench import Stream
from trace_dist.utils import dist
from trace_dist.utils.files import load_tensors, save_tensors
from trace_dist.utils.rng import random_numbers_kept

MEMORY = "memory/"
"""Before the names of what is kept beside the weights, in files."""


def dense_setup(setup: MemorySetup) -> MemorySetup:
    """Training of every weight in fp32: weights, gradients and both moments, 16 bytes per parameter, and what a step takes."""
    return replace(
        setup, density=1.0, granularity="tensor", maskable="all", dtype="float32", quantize="none",
        state_dtype="float32", offload="none",
    )  # fmt: skip


class Dense(Method):
    """One model of its own, in fp32. Where ``continues``, its trained parameters are the state between tasks."""

    masked = False
    on_ranks = False
    continues = True

    def __init__(self, name: str, setting: Setting, options: Any) -> None:
        super().__init__(name, setting, options)
        self.memory: dict[str, Tensor] = {}  # of earlier tasks; a tensor is replaced, never changed
        self._module: nn.Module | None = None  # None until it is needed
        self._total = 0  # parameters of the base; set with the model

    @classmethod
    def check(cls, name: str, cfg: RunConfig) -> None:
        if cfg.target.quantize != "none":
            raise ValueError(
                f"continual.methods={name!r}: trains dense weights, but target.quantize is {cfg.target.quantize}; "
                "remove the method"
            )

    @classmethod
    def flops(cls, cfg: RunConfig, num_parameters: int, num_tokens: float) -> float:
        return dense_flops(num_parameters, num_tokens, cfg.train.activation_checkpointing)

    @classmethod
    def memory_setup(cls, cfg: RunConfig, setup: MemorySetup) -> MemorySetup:
        return dense_setup(setup)

    @abstractmethod
    def prepare(self, module: Any) -> nn.Module:
        """The model that is trained, from the base; its parameters that require gradients are trained."""

    def begin(self, stream: Stream) -> None:
        """Called before a task is trained; the model holds what the tasks before it left."""
        if not self.continues:
            self.drop()

    def penalise(self) -> None:
        """Add to the gradients of a step."""

    def end(self, stream: Stream, learner: DenseLearner) -> None:
        """Called when a task is trained; what it leaves in the model is scored and kept."""

    @property
    def module(self) -> Any:
        """The model."""
        if self._module is None:
            # in the middle of a training, too, whose dropout must not depend on it
            with random_numbers_kept():
                self._module = self._load()
        return self._module

    def _load(self) -> nn.Module:
        # in fp32 whatever the target's type: a bf16 copy without a master would stall; see `autocast`
        base: Any = load_model(self.setting.base, torch.float32)
        self._total = sum(parameter.numel() for parameter in base.parameters())
        module = self.prepare(base.to(dist.local_device()))
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise ValueError(
                f"continual.methods={self.name!r}: finds nothing that it could train in this model; remove the method"
            )
        return module

    def drop(self) -> None:
        """Forget the model: it is the base when it is next needed, and never two are held."""
        self._module = None

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def kept(self) -> dict[str, Tensor]:
        """All that a task changes: the state between tasks."""
        return {**self.trained(), **{MEMORY + name: value for name, value in self.memory.items()}}

    @torch.no_grad()
    def restore(self, kept: Mapping[str, Tensor]) -> None:
        """Become what ``kept`` gave."""
        device = dist.local_device()
        self.memory = {
            name.removeprefix(MEMORY): value.to(device)
            for name, value in kept.items()
            if name.startswith(MEMORY)
        }
        for name, parameter in self.trained().items():
            parameter.copy_(kept[name])
            # where training diverged
            parameter.grad = None

    def learn(self, stream: Stream) -> TrainResult:
        with self.setting.training(self.name, stream.task.name) as options:
            self.begin(stream)
            learner = self.learner(self.lr)
            validation = self.setting.validation(self.validated(stream), self._score)
            result = self._train(
                learner, stream, self.steps(stream), rate=self.lr_field, validation=validation, **options
            )
            self.end(stream, learner)
        return result

    @contextmanager
    def trial(self, stream: Stream, part: Stream, lr: float) -> Iterator[Learner]:
        # In host memory: a GPU that holds the training may have no room for a copy of the model.
        before = {
            name: value.detach().to("cpu", copy=True) if isinstance(value, nn.Parameter) else value
            for name, value in self.kept().items()
        }
        try:
            self.begin(part)
            learner = self.learner(lr)
            self._train(
                learner,
                part,
                part.steps,
                trial=True,
                horizon=self.steps(stream),
                rate="race.grid",
                description=f"{self.name} at {lr:g}",
            )
            self.end(part, learner)
            yield learner
        finally:
            self.restore(before)

    def learner(self, lr: float) -> DenseLearner:
        """What trains the model."""
        cfg = self.setting.cfg
        return DenseLearner(
            self.module, self.trained().values(), cfg.train, lr, cfg.target.dtype, penalise=self.penalise
        )

    def steps(self, stream: Stream) -> int:
        """Optimizer steps of a task."""
        return stream.steps

    def validated(self, stream: Stream) -> list[Stream]:
        """The tasks on whose validation examples the training of one is looked at."""
        return [stream]

    def _score(self, task: Task) -> float:
        with autocast(self.setting.cfg.target.dtype):
            return self.setting.judge.evaluate(self.module, task).value

    def batches(self, stream: Stream) -> Batches:
        """What a task, or a part of it, is trained on."""
        if isinstance(self.options, Replayed):
            return replaying(self.setting, stream, self.options)
        return self.setting.bench.batches([stream], self.setting.cfg.train.batch_size)

    def _train(
        self, learner: DenseLearner, stream: Stream, steps: int, trial: bool = False, **options: Any
    ) -> TrainResult:
        cfg = self.setting.cfg.train.strict() if trial else self.setting.cfg.train
        return train_learner(learner, self.batches(stream), cfg, steps, **options)

    def score(self) -> Row:
        with autocast(self.setting.cfg.target.dtype):
            return self.setting.judge.score(self.module)

    def facts(self) -> dict[str, Any]:
        trainable = sum(parameter.numel() for parameter in self.trained().values())
        return {"trainable": trainable, "density": trainable / self._total}

    def state(self, folder: Path) -> None:
        save_tensors(folder / "weights.safetensors", self.kept(), {"format": "trace_dist.weights"})

    def load_state(self, folder: Path) -> None:
        tensors, _ = load_tensors(folder / "weights.safetensors", "weights")
        self.restore(tensors)
