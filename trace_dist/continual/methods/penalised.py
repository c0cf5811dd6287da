"""What full fine-tuning with a penalty has in common: what a task moves is held against what earlier tasks left."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from trace_dist.continual.methods.full import Full
from trace_dist.continual.methods.options import Replayed
from trace_dist.train.workbench import Stream


@dataclass(frozen=True)
class Strength(Replayed):
    """Of a method with a penalty."""

    strength: float = 1.0
    """Factor of the penalty, which is added to the loss in nats per answer token; 0 is full fine-tuning."""

    def check(self) -> None:
        super().check()
        self.at_least(0, "strength")


class Penalised(Full):
    """Full fine-tuning with a penalty on what a task moves. ``memory`` holds a tensor per parameter, from the first task on."""

    copies = 2  # where the task began, and the memory

    def begin(self, stream: Stream) -> None:
        self._start = {name: parameter.detach().clone() for name, parameter in self.trained().items()}

    @torch.no_grad()
    def penalise(self) -> None:
        if not self.memory:
            return
        for name, parameter in self.trained().items():
            if parameter.grad is not None:
                moved = parameter - self._start[name]
                parameter.grad.add_(self.slope(moved, self.memory[name]), alpha=self.options.strength)

    def moved(self) -> dict[str, Tensor]:
        """How far the present task moved each parameter."""
        return {name: p.detach() - self._start[name] for name, p in self.trained().items()}

    @staticmethod
    @abstractmethod
    def slope(moved: Tensor, memory: Tensor) -> Tensor:
        """Gradient of the penalty for a parameter, with strength 1.

        Args:
            moved: what the task has added to the parameter so far.
            memory: of earlier tasks, of the same shape.
        """
