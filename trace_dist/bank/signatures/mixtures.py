"""What the kinds with a density of their own share: coordinates, shrinkage, the number of components."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from trace_dist.bank.density import Mixture
from trace_dist.bank.gaussian import MIN_RELATIVE_VARIANCE, shrinkage_intensity
from trace_dist.bank.signature import Clusters
from trace_dist.bank.signatures.folds import choose_num_clusters, largest_number, simplest

Array = NDArray[np.float64]
MIN_RIDGE = 1e-9
"""Least variance of a direction, in units of a standardised dimension's: one of 0 would outweigh all else."""
MAX_ITERATIONS = 100
STRENGTHS = (1.0, 2**-2, 2**-4, 2**-6, 2**-8, 2**-10)
"""Of shrinkage, in units of what suits a single Gaussian. Representations of a task are none, and a fine difference between two
tasks may lie in directions of small variance, which shrinkage hides."""


def best_number(fit: Callable[[Array, int], Clusters], x: Array, max_clusters: int, seed: int) -> int:
    """The number of components that left-out prompts are best described by.

    Args:
        fit: (x, K) -> a mixture of K components.
        x: [N, D] representations.
        max_clusters: largest K.
        seed: of the folds.
    """

    def log_likelihoods(train: Array, test: Array, num_clusters: int) -> Array:
        found = fit(train, num_clusters)
        return Mixture.of_clusters(found).log_density(torch.from_numpy(test)).numpy()

    return choose_num_clusters(x, largest_number(x, max_clusters), seed, log_likelihoods)


def best_strength(fit: Callable[[Array, Sequence[float]], list[Clusters]], x: Array, seed: int) -> float:
    """The strongest shrinkage whose mixture describes left-out prompts well (``folds.simplest``), of ``STRENGTHS``.

    Args:
        fit: (x, strengths) -> a mixture for each.
        x: [N, D] representations.
        seed: of the folds.
    """

    def log_likelihoods(train: Array, test: Array) -> Array:
        found = fit(train, STRENGTHS)
        return np.stack(
            [Mixture.of_clusters(each).log_density(torch.from_numpy(test)).numpy() for each in found]
        )

    return STRENGTHS[simplest(x, seed, log_likelihoods)]


def spread(x: Array) -> Array:
    """[D] standard deviations of x [N, D]; the smallest are raised.

    Raises:
        ValueError: all rows are equal.
    """
    variance = x.var(axis=0)
    if not variance.mean() > 0:
        raise ValueError(
            "bank.signature: all prompts of the task have the same representation, which has no density; "
            "give distinct prompts, or use kmeans"
        )
    return np.sqrt(variance.clip(min=MIN_RELATIVE_VARIANCE * variance.mean()))


def principal_axes(z: Array) -> Array:
    """[r, D] orthonormal rows that span centred rows z [N, D]; the identity where that saves nothing."""
    num, dim = z.shape
    if num > dim:
        return np.eye(dim)
    _, singular, axes = np.linalg.svd(z, full_matrices=False)
    return axes[singular > 1e-9 * singular[0]]


def responsibilities(model: Any, y: Array) -> Array:
    """[N, K] shares of the components in each row of y, by a model of scikit-learn."""
    with warnings.catch_warnings():
        # after 100 iterations the left-out prompts judge what was found
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(y).predict_proba(y)


def ridge_of(y: Array, dim: int) -> float:
    """Variance that is added along every axis while scikit-learn looks for components of y [N, r] in D dimensions."""
    covariance = torch.from_numpy(np.cov(y, rowvar=False, bias=True).reshape(y.shape[1], y.shape[1]))
    rho = shrinkage_intensity(covariance, max(1, len(y) - 1), dim)
    return max(MIN_RIDGE, rho * covariance.trace().item() / dim)


def shrunk(x: Array, scale: Array, axes: Array, shares: Array, strength: float) -> Clusters:
    """Components with covariances that are shrunk as in ``bank.gaussian``, each by what its prompts allow, times ``strength``.

    Args:
        x: [N, D] representations.
        scale: [D] units.
        axes: [r, D] orthonormal directions that hold all of the spread of x / scale.
        shares: [N, K] of the components in each row.
    """
    weight = torch.from_numpy(shares)
    counts = weight.sum(dim=0)
    means = weight.T @ torch.from_numpy(x) / counts[:, None]
    factors, ridges = zip(
        *(
            _shrunk_factor(torch.from_numpy((x - mean.numpy()) / scale @ axes.T), share, x.shape[1], strength)
            for mean, share in zip(means, weight.T, strict=True)
        ),
        strict=True,
    )
    extra = {
        "std": torch.from_numpy(scale)[None].float(),
        "axes": torch.from_numpy(axes).float().contiguous(),
        "cholesky": torch.stack(factors).float(),
        "ridge": torch.tensor(ridges),
    }
    return Clusters(means, counts.round().long().clamp(min=1), torch.zeros(0, x.shape[1]), extra)


def _shrunk_factor(gaps: Tensor, share: Tensor, dim: int, strength: float) -> tuple[Tensor, float]:
    """Cholesky factor [r, r] of a component's covariance, and the variance of every other direction."""
    num_samples = max(1.0, share.sum().item() - 1)
    covariance = (gaps * share[:, None]).T @ gaps / num_samples
    rho = strength * shrinkage_intensity(covariance, int(num_samples), dim)
    ridge = max(MIN_RIDGE, rho * covariance.trace().item() / dim)
    covariance = (1 - rho) * covariance
    covariance.diagonal().add_(ridge)
    return torch.linalg.cholesky(covariance), ridge
