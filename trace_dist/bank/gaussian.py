"""The covariance that all clusters of all tasks share, and the coordinates in which it is the identity.

With S the pooled covariance within clusters on n degrees of freedom, s = sqrt(diag S), C = S / (s s^T):

    Sigma = diag(s) ((1 - rho) C + rho I) diag(s),    x -> L^-1 (x / s)  with  L L^T = (1 - rho) C + rho I

so squared Mahalanobis distances become squared Euclidean ones, and no inverse is formed. Correlations are
shrunk, not variances: hidden states of language models have a few dimensions thousands of times larger than
the rest, and a ridge on S itself would drown the small ones. rho is the oracle approximating shrinkage of
Chen, Wiesel, Eldar and Hero (2010, "Shrinkage algorithms for MMSE covariance estimation", eq. 23): it needs
S and n alone, where Ledoit-Wolf would need the data of earlier tasks again, and it keeps Sigma positive
definite when there are fewer prompts than dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MIN_RELATIVE_VARIANCE = 1e-12
"""Smaller variances are raised to this share of the mean: one of 0 would outweigh all else."""


def shrinkage_intensity(covariance: Tensor, num_samples: int, dim: int) -> float:
    """Share rho in [0, 1] of (mean variance) I in its best mixture with ``covariance``.

    Args:
        covariance: [r, r] float64 sample covariance in coordinates that hold all of its variance, r <= D.
        num_samples: degrees of freedom n behind it, at least 1.
        dim: D.
    """
    trace, trace_sq = covariance.trace().item(), covariance.square().sum().item()
    unequal = (num_samples + 1 - 2 / dim) * (trace_sq - trace**2 / dim)
    if unequal <= 0:  # already a multiple of the identity
        return 1.0
    return min(1.0, ((1 - 2 / dim) * trace_sq + trace**2) / unequal)


@dataclass(frozen=True, eq=False)
class SharedGaussian:
    """N(., Sigma) with one Sigma for every cluster."""

    std: Tensor
    """[D] float64 standard deviations."""
    cholesky: Tensor
    """[D, D] float64 lower factor L of the shrunk correlation."""
    shrinkage: float
    """rho in [0, 1]."""

    @classmethod
    def from_scatter(cls, scatter: Tensor, num_samples: int) -> SharedGaussian:
        """Estimate from a sum of squares.

        Args:
            scatter: [D, D] float64, sum over samples of the outer product of the distance from the
                cluster mean with itself.
            num_samples: degrees of freedom: samples minus clusters.

        Raises:
            ValueError: no degree of freedom is left, or all samples lie on their cluster means.
        """
        if num_samples < 1:
            raise ValueError(
                f"signatures: {num_samples} degrees of freedom (prompts minus clusters), must be at least 1; "
                "give more prompts per task or allow fewer clusters"
            )
        covariance = scatter / num_samples
        variance = covariance.diagonal()
        mean_variance = variance.mean()
        if not mean_variance > 0:
            raise ValueError(
                "signatures: all prompts of a cluster have the same representation, must differ; "
                "give distinct prompts"
            )
        std = variance.clamp(min=MIN_RELATIVE_VARIANCE * mean_variance.item()).sqrt()
        correlation = covariance / std / std[:, None]
        rho = shrinkage_intensity(correlation, num_samples, len(std))
        shrunk = (1 - rho) * correlation
        shrunk.diagonal().add_(rho)
        return cls(std, torch.linalg.cholesky(shrunk), rho)

    @classmethod
    def of_points(cls, means: Tensor) -> SharedGaussian:
        """For clusters without any spread, [C, D]: independent dimensions, each as wide as what lies in it."""
        size = means.double().abs().amax(dim=0)
        std = size.where(size > 0, torch.ones_like(size))
        return cls(std, torch.eye(len(std), dtype=torch.float64), 1.0)

    def whiten(self, x: Tensor) -> Tensor:
        """[N, D] of any float dtype -> [N, D] float64 coordinates in which Sigma is the identity."""
        scaled = x.to(torch.float64) / self.std
        return torch.linalg.solve_triangular(self.cholesky, scaled.T, upper=False).T

    @property
    def log_det(self) -> float:
        """log |Sigma|."""
        return 2 * (self.std.log().sum() + self.cholesky.diagonal().log().sum()).item()
