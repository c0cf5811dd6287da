"""How typical is a prompt of one task, by that task's signature alone? A log density, comparable between tasks.

    log p(x) = log sum_k w_k N(x; mu_k, Sigma_k)

In units std and along r orthonormal axes A (rows), z = (x - mu) / std and y = A z, a component's covariance is L L^T
on y and ridge * I on everything else, so with D dimensions

    -2 log N(x) = |L^-1 y|^2 + (|z|^2 - |y|^2) / ridge + 2 log|L| + (D - r) log ridge + 2 sum log std + D log 2 pi

Kinds that share a covariance between tasks have one of their own here, from their own scatter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trace_dist.bank.gaussian import SharedGaussian
from trace_dist.bank.signature import DENSITY, Clusters, Signature


@dataclass(frozen=True, eq=False)
class Mixture:
    """A mixture of K Gaussians in D dimensions; tensors are float64, and a first dimension of 1 stands for all components."""

    weights: Tensor
    """[K] shares; they sum to 1."""
    means: Tensor
    """[K, D]."""
    std: Tensor
    """[1 or K, D] units."""
    axes: Tensor
    """[r, D] orthonormal rows."""
    cholesky: Tensor
    """[1 or K, r, r] lower factor L of the covariance along the axes."""
    ridge: Tensor
    """[1 or K] variance of every other direction, in units."""

    @classmethod
    def of_clusters(cls, found: Clusters | Signature) -> Mixture:
        """What a kind with a density of its own has found."""
        extra = {name: found.extra[name].double() for name in DENSITY}
        return cls(found.counts.double() / found.counts.sum(), found.means.double(), **extra)

    @classmethod
    def of(cls, signature: Signature) -> Mixture:
        """A task's density, whatever the kind of its signature.

        Raises:
            ValueError: its prompts have no spread.
        """
        if signature.extra:
            return cls.of_clusters(signature)
        scatter = signature.scatter
        if signature.likelihood == "variances":
            scatter = scatter.diagonal().diag()
        gaussian = SharedGaussian.from_scatter(scatter, signature.num_samples)
        return cls(
            signature.weights,
            signature.means.double(),
            std=gaussian.std[None],
            axes=torch.eye(signature.dim, dtype=torch.float64),
            cholesky=gaussian.cholesky[None],
            ridge=torch.ones(1, dtype=torch.float64),
        )

    def log_density(self, x: Tensor) -> Tensor:
        """[N, D] of any float dtype -> [N] float64, nats."""
        x = x.to(torch.float64)
        columns = [weight.log() + self._component(x, k) for k, weight in enumerate(self.weights)]
        return torch.stack(columns, dim=1).logsumexp(dim=1)

    def _component(self, x: Tensor, k: int) -> Tensor:
        std, factor, ridge = (each[min(k, len(each) - 1)] for each in (self.std, self.cholesky, self.ridge))
        (num_axes, dim), z = self.axes.shape, (x - self.means[k]) / std
        y = z @ self.axes.T
        along = torch.linalg.solve_triangular(factor, y.T, upper=False).square().sum(dim=0)
        beyond = (z.square().sum(dim=1) - y.square().sum(dim=1)).clamp(min=0)
        if num_axes == dim:
            beyond = torch.zeros_like(along)
        log_det = 2 * (factor.diagonal().log().sum() + std.log().sum()) + (dim - num_axes) * ridge.log()
        return -(along + beyond / ridge + log_det + dim * math.log(2 * math.pi)) / 2
