"""``random_features``: ridge regression of the classes on a random, rectified expansion of the frozen base's representations.

RanPAC (arXiv 2307.02251) without its first-session adapter: h = relu(x W), W random and fixed; the Gram matrix of h and its sums
by class are added up over the tasks, and the ridge is chosen on a fifth of each new task. It decorrelates as LDA does, in far
more dimensions. Representations are first scaled by the mean and the deviation that the first task had, where it had
one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trace_dist.config.checks import Section
from trace_dist.continual.methods.frozen import Frozen

RIDGES = tuple(10.0**power for power in range(-3, 7))
HELD_OUT = 5
"""One example in so many chooses the ridge."""


@dataclass(frozen=True)
class Options(Section):
    """Of ``random_features``."""

    section: ClassVar[str] = "continual.options.random_features"

    features: int = 2000
    """Random features."""

    def check(self) -> None:
        self.at_least(1, "features")


class RandomFeatures(Frozen):
    """Random projection, rectifier, ridge."""

    label = "random features (RanPAC)"
    colour = "sky"

    def add(self, x: Tensor, labels: Tensor) -> None:
        if "mean" not in self.sums:
            self.sums["mean"] = x.double().mean(0)
            deviation = x.double().std(0, correction=0)
            self.sums["scale"] = deviation.masked_fill(deviation < 1e-6, 1.0)
        h = self._expanded(x)
        targets = torch.nn.functional.one_hot(labels, len(self.classes)).double()
        gram, cross = self._so_far(h.shape[1])
        held = torch.arange(len(h)) % HELD_OUT == 0
        part = gram + h[~held].T @ h[~held], cross + h[~held].T @ targets[~held]
        errors = [
            (h[held] @ _solved(*part, ridge) - targets[held]).square().mean().item() for ridge in RIDGES
        ]
        self.sums["ridge"] = torch.tensor([RIDGES[errors.index(min(errors))]], dtype=torch.float64)
        self.sums["gram"], self.sums["cross"] = gram + h.T @ h, cross + h.T @ targets

    def scores(self, x: Tensor) -> Tensor:
        weights = _solved(self.sums["gram"], self.sums["cross"], self.sums["ridge"].item())
        return self._expanded(x) @ weights

    def _so_far(self, width: int) -> tuple[Tensor, Tensor]:
        """Gram matrix and sums by class before a task, with columns for its new classes."""
        cross = torch.zeros(width, len(self.classes), dtype=torch.float64)
        if "gram" not in self.sums:
            return torch.zeros(width, width, dtype=torch.float64), cross
        before = self.sums["cross"]
        cross[:, : before.shape[1]] = before
        return self.sums["gram"], cross

    def _expanded(self, x: Tensor) -> Tensor:
        """[N, features] fp64."""
        random = torch.Generator().manual_seed(self.setting.cfg.seed)
        weights = torch.randn(x.shape[1], self.options.features, generator=random, dtype=torch.float64)
        return ((x.double() - self.sums["mean"]) / self.sums["scale"] @ weights).relu()


def _solved(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """(gram + ridge I)^-1 cross."""
    return torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), cross)


METHOD = RandomFeatures
