"""Signature diagonal: a mixture of Gaussians whose dimensions are independent, by expectation maximisation."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.mixture import GaussianMixture

from trace_dist.bank.signature import Clusters
from trace_dist.bank.signatures.mixtures import MAX_ITERATIONS, Array, best_number, responsibilities, spread

label = "mixture of Gaussians, a variance per dimension for each component"
likelihood = "density"
MIN_VARIANCE = 1e-3
"""Added to every variance, in units of the task's own along that dimension."""


def fit(x: Array, max_clusters: int, seed: int) -> Clusters:
    """A mixture of at most ``max_clusters`` components on x [N, D].

    Raises:
        ValueError: all rows are equal.
    """

    def mixture(x: Array, num_clusters: int) -> Clusters:
        scale, centre = spread(x), x.mean(axis=0)
        model = GaussianMixture(
            num_clusters,
            covariance_type="diag",
            reg_covar=MIN_VARIANCE,
            max_iter=MAX_ITERATIONS,
            random_state=seed,
        )
        counts = responsibilities(model, (x - centre) / scale).sum(axis=0)
        dim = x.shape[1]
        extra = {
            "std": torch.from_numpy(np.sqrt(model.covariances_) * scale).float(),
            "axes": torch.zeros(0, dim),
            "cholesky": torch.zeros(num_clusters, 0, 0),
            "ridge": torch.ones(num_clusters),
        }
        means = torch.from_numpy(model.means_ * scale + centre)
        return Clusters(
            means, torch.from_numpy(counts).round().long().clamp(min=1), torch.zeros(0, dim), extra
        )

    return mixture(x, best_number(mixture, x, max_clusters, seed))
