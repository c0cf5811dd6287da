"""Signature dirichlet: a Dirichlet-process mixture of Gaussians, as in PROTEUS (arXiv 2603.13235).

The process decides by itself how many of ``max_clusters`` components it needs (truncated stick breaking, variational
inference); those that stand for fewer than 5 prompts are dropped. They are sought with independent coordinates: with free
covariances a hundred prompts in hundreds of dimensions fit any split. Covariances are then estimated and shrunk as those of
``full``.
"""

from __future__ import annotations

from collections.abc import Sequence

from sklearn.mixture import BayesianGaussianMixture

from trace_dist.bank.signature import Clusters
from trace_dist.bank.signatures.folds import MIN_PROMPTS_PER_CLUSTER, largest_number
from trace_dist.bank.signatures.mixtures import (
    MAX_ITERATIONS,
    Array,
    best_strength,
    principal_axes,
    responsibilities,
    ridge_of,
    shrunk,
    spread,
)

label = "Dirichlet-process mixture of Gaussians"
likelihood = "density"
CONCENTRATION = 1e-3
"""Of the process: the smaller, the fewer components."""


def fit(x: Array, max_clusters: int, seed: int) -> Clusters:
    """A mixture on x [N, D].

    Raises:
        ValueError: all rows are equal.
    """

    def mixtures(x: Array, strengths: Sequence[float]) -> list[Clusters]:
        scale = spread(x)
        z = (x - x.mean(axis=0)) / scale
        axes = principal_axes(z)
        y = z @ axes.T
        model = BayesianGaussianMixture(
            n_components=largest_number(x, max_clusters),
            covariance_type="diag",
            weight_concentration_prior_type="dirichlet_process",
            weight_concentration_prior=CONCENTRATION,
            reg_covar=ridge_of(y, x.shape[1]),
            max_iter=MAX_ITERATIONS,
            random_state=seed,
        )
        shares = responsibilities(model, y)
        counts = shares.sum(axis=0)
        kept = counts >= min(MIN_PROMPTS_PER_CLUSTER, counts.max())
        shares = shares[:, kept]
        # a prompt so far away that those kept have no share in it at all goes to the nearest
        lost = shares.sum(axis=1) == 0
        gaps = y[lost, None] - model.means_[kept]
        shares[lost, (gaps**2 / model.covariances_[kept]).sum(axis=2).argmin(axis=1)] = 1.0
        shares /= shares.sum(axis=1, keepdims=True)
        return [shrunk(x, scale, axes, shares, strength) for strength in strengths]

    return mixtures(x, [best_strength(mixtures, x, seed)])[0]
