"""Signature kmeans: k-means clusters with one covariance, which all tasks share (PROTEUS, arXiv 2603.13235, has a mixture).

K is chosen by the log-likelihood of left-out folds under clusters with one shrunk covariance; k-means is then run on all.
Dimensions are standardised for k-means.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from torch import Tensor

from trace_dist.bank.gaussian import shrinkage_intensity
from trace_dist.bank.signature import Clusters
from trace_dist.bank.signatures.folds import choose_num_clusters, coordinates, largest_number

label = "k-means clusters, one covariance for all tasks"
likelihood = "covariance"
NUM_KMEANS_STARTS = 10
MIN_RIDGE = 1e-12  # in units of a standardised dimension's variance: duplicate prompts may leave no spread


def _cluster(y: NDArray[np.float64], num_clusters: int, seed: int) -> NDArray[np.int64]:
    """K-means labels of the rows of y [N, D], from 0 without gaps."""
    labels = KMeans(num_clusters, n_init=NUM_KMEANS_STARTS, random_state=seed).fit_predict(y)
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)


def _moments(x: NDArray[np.float64], labels: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
    """Of labelled rows [N, D]: means [K, D], counts [K] and residuals [N, D]."""
    counts = np.bincount(labels)
    means = np.stack([x[labels == cluster].mean(axis=0) for cluster in range(len(counts))])
    return torch.from_numpy(means), torch.from_numpy(counts), torch.from_numpy(x - means[labels])


def _log_likelihoods(
    train: NDArray[np.float64], test: NDArray[np.float64], num_clusters: int, seed: int, dim: int
) -> NDArray[np.float64]:
    """Log density (nats, up to a constant) of each row of ``test`` under the clusters fitted to ``train``.

    The covariance is shrunk to a multiple of the identity, which no rotation changes; the ``dim`` - r
    dimensions that the r coordinates leave out hold no data and add to its determinant alone.
    """
    means, counts, residuals = _moments(train, _cluster(train, num_clusters, seed))
    num_samples = len(train) - len(means)
    covariance = residuals.T @ residuals / num_samples
    rho = shrinkage_intensity(covariance, num_samples, dim)
    ridge = (rho * covariance.trace() / dim).clamp(min=MIN_RIDGE)
    factor = torch.linalg.cholesky((1 - rho) * covariance + ridge * torch.eye(len(covariance)))
    log_det = 2 * factor.diagonal().log().sum() + (dim - len(covariance)) * ridge.log()
    gaps = torch.from_numpy(test).T - means[:, :, None]  # [K, r, N]
    distances_sq = torch.linalg.solve_triangular(factor, gaps, upper=False).square().sum(dim=1)
    log_joint = (counts.double() / len(train)).log()[:, None] - distances_sq / 2
    return (log_joint.logsumexp(dim=0) - log_det / 2).numpy()


def fit(x: NDArray[np.float64], max_clusters: int, seed: int) -> Clusters:
    """Clusters of x [N, D]; ``factor`` is that of the sum of squares within them."""
    y = coordinates(x)

    def log_likelihoods(
        train: NDArray[np.float64], test: NDArray[np.float64], num_clusters: int
    ) -> NDArray[np.float64]:
        return _log_likelihoods(train, test, num_clusters, seed, x.shape[1])

    num_clusters = choose_num_clusters(y, largest_number(x, max_clusters), seed, log_likelihoods)
    means, counts, residuals = _moments(x, _cluster(y, num_clusters, seed))
    # same sum of squares, at most D rows, no row is a prompt
    return Clusters(means, counts, torch.linalg.qr(residuals, mode="r").R)
