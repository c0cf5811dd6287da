"""Signature full: a mixture of Gaussians with a covariance each, by expectation maximisation.

Fewer prompts than dimensions span a subspace; components are sought there, and every direction beyond it has the
variance to which covariances are shrunk. How much they are shrunk is chosen as the number of components is: by left-out prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

from sklearn.mixture import GaussianMixture

from trace_dist.bank.signature import Clusters
from trace_dist.bank.signatures.mixtures import (
    MAX_ITERATIONS,
    Array,
    best_number,
    best_strength,
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

    def mixtures(x: Array, num_clusters: int, strengths: Sequence[float]) -> list[Clusters]:
        scale = spread(x)
        z = (x - x.mean(axis=0)) / scale
        axes = principal_axes(z)
        y = z @ axes.T
        ridge = ridge_of(y, x.shape[1])
        model = GaussianMixture(num_clusters, reg_covar=ridge, max_iter=MAX_ITERATIONS, random_state=seed)
        shares = responsibilities(model, y)
        return [shrunk(x, scale, axes, shares, strength) for strength in strengths]

    def suited(number: int) -> float:
        return best_strength(lambda x, strengths: mixtures(x, number, strengths), x, seed)

    strength = suited(1)
    number = best_number(lambda x, number: mixtures(x, number, [strength])[0], x, max_clusters, seed)
    return mixtures(x, number, [strength if number == 1 else suited(number)])[0]
