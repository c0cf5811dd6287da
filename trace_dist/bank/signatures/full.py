"""Signature full: a mixture of Gaussians with a covariance each, by expectation maximisation.

Fewer prompts than dimensions span a subspace; components are sought there, and every direction beyond it has the
variance to which covariances are shrunk.
"""

from __future__ import annotations

from sklearn.mixture import GaussianMixture

from trace_dist.bank.signature import Clusters
from trace_dist.bank.signatures.mixtures import (
    MAX_ITERATIONS,
    Array,
    best_of,
    principal_axes,
    responsibilities,
    ridge_of,
    shrunk,
    spread,
)

label = "mixture of Gaussians, a covariance for each component"
likelihood = "density"


def fit(x: Array, max_clusters: int, seed: int) -> Clusters:
    """A mixture of at most ``max_clusters`` components on x [N, D].

    Raises:
        ValueError: all rows are equal.
    """

    def mixture(x: Array, num_clusters: int) -> Clusters:
        scale = spread(x)
        z = (x - x.mean(axis=0)) / scale
        axes = principal_axes(z)
        y = z @ axes.T
        ridge = ridge_of(y, x.shape[1])
        model = GaussianMixture(num_clusters, reg_covar=ridge, max_iter=MAX_ITERATIONS, random_state=seed)
        return shrunk(x, scale, axes, responsibilities(model, y))

    return best_of(mixture, x, max_clusters, seed)
