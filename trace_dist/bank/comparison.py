"""How tasks are compared for a prompt: a class per likelihood ([Note: likelihoods] in bank/signature.py)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from trace_dist.bank.density import Mixture
from trace_dist.bank.gaussian import SharedGaussian
from trace_dist.bank.signature import Signature


class Comparison(Protocol):
    """Scores of all tasks, to which tasks are added one by one."""

    def add(self, signature: Signature) -> None:
        """Append a task."""

    def scores(self, x: Tensor) -> Tensor:
        """[N, D] on the CPU -> [N, T] float64, nats up to a constant per row."""


class Shared:
    """One covariance for all clusters of all tasks: a sum over tasks, so earlier data is never needed again.

    Args:
        diagonal: its variances alone.
    """

    def __init__(self, diagonal: bool = False) -> None:
        self._diagonal = diagonal
        self._signatures: list[Signature] = []
        self._scatter: Tensor | None = None  # [D, D] float64, not None iff there is a signature
        # both are worked out when first needed after an `add`
        self._gaussian: SharedGaussian | None = None
        self._means: list[Tensor] | None = None

    def add(self, signature: Signature) -> None:
        """Costs one [D, D] sum, and one Cholesky factor at the next use."""
        scatter = signature.scatter.diagonal().diag() if self._diagonal else signature.scatter
        self._scatter = scatter if self._scatter is None else self._scatter + scatter
        self._signatures.append(signature)
        self._gaussian, self._means = None, None

    @property
    def gaussian(self) -> SharedGaussian:
        """The shared covariance."""
        if self._scatter is None:
            raise AssertionError("no task was added")
        if self._gaussian is None:
            num_samples = sum(signature.num_samples for signature in self._signatures)
            self._gaussian = SharedGaussian.from_scatter(self._scatter, num_samples)
        return self._gaussian

    def whitened_means(self) -> list[Tensor]:
        """Per task, [K, D] float64 cluster means in whitened coordinates."""
        if self._means is None:
            self._means = [self.gaussian.whiten(signature.means) for signature in self._signatures]
        return self._means

    def log_priors(self) -> list[Tensor]:
        """Per task, [K] float64 log(w_k / T): tasks are equally likely beforehand."""
        return [(signature.weights / len(self._signatures)).log() for signature in self._signatures]

    def scores(self, x: Tensor) -> Tensor:
        """Log posterior of each task's best cluster."""
        white = self.gaussian.whiten(x)
        columns = [
            (log_prior - torch.cdist(white, means).square() / 2).amax(dim=1)
            for means, log_prior in zip(self.whitened_means(), self.log_priors(), strict=True)
        ]
        return torch.stack(columns, dim=1)


class Own:
    """A density for each task; to add one changes none of the others."""

    def __init__(self) -> None:
        self._densities: list[Mixture] = []

    def add(self, signature: Signature) -> None:
        """Append a task."""
        self._densities.append(Mixture.of(signature))

    def scores(self, x: Tensor) -> Tensor:
        """Log densities: tasks are equally likely beforehand."""
        return torch.stack([density.log_density(x) for density in self._densities], dim=1)


COMPARISONS: dict[str, Callable[[], Comparison]] = {
    "covariance": Shared,
    "variances": partial(Shared, diagonal=True),
    "density": Own,
}
