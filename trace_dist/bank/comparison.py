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

_MOST_DIRECT = 25
"""Prompts whose distances are added up one by one; those of more come from a product of matrices."""


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
        self._clusters: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, signature: Signature) -> None:
        """Costs one [D, D] sum, and one Cholesky factor at the next use."""
        scatter = signature.scatter.diagonal().diag() if self._diagonal else signature.scatter
        self._scatter = scatter if self._scatter is None else self._scatter + scatter
        self._signatures.append(signature)
        self._gaussian, self._clusters = None, None

    @property
    def gaussian(self) -> SharedGaussian:
        """The shared covariance."""
        if self._scatter is None:
            raise AssertionError("no task was added")
        if self._gaussian is None:
            num_samples = sum(signature.num_samples for signature in self._signatures)
            if any(signature.has_spread for signature in self._signatures):
                self._gaussian = SharedGaussian.from_scatter(self._scatter, num_samples)
            else:
                # Each task has one prompt alone: the nearest one wins.
                self._gaussian = SharedGaussian.of_points(torch.cat([s.means for s in self._signatures]))
        return self._gaussian

    def whitened_means(self) -> list[Tensor]:
        """Per task, [K, D] float64 cluster means in whitened coordinates."""
        return [self.gaussian.whiten(signature.means) for signature in self._signatures]

    def log_priors(self) -> list[Tensor]:
        """Per task, [K] float64 log(w_k / T): tasks are equally likely beforehand."""
        return [(signature.weights / len(self._signatures)).log() for signature in self._signatures]

    def clusters(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of all clusters: [C, D] whitened means, [C] log priors, [C] index of their task; kept until a task is added."""
        if self._clusters is None:
            owner = torch.repeat_interleave(torch.tensor([s.num_clusters for s in self._signatures]))
            self._clusters = torch.cat(self.whitened_means()), torch.cat(self.log_priors()), owner
        return self._clusters

    def scores(self, x: Tensor) -> Tensor:
        """Log posterior of each task's best cluster."""
        white = self.gaussian.whiten(x)
        means, log_prior, owner = self.clusters()
        # As torch chooses for the few clusters of one task: by the number of prompts.
        mode = "use_mm_for_euclid_dist" if len(white) > _MOST_DIRECT else "donot_use_mm_for_euclid_dist"
        joint = log_prior - torch.cdist(white, means, compute_mode=mode).square() / 2
        scores = joint.new_full((len(white), len(self._signatures)), -torch.inf)
        return scores.scatter_reduce_(1, owner.expand(len(white), -1), joint, "amax")


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
