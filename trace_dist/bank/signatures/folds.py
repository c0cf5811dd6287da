"""How many clusters? As many as left-out prompts are best described by; and coordinates in which to look for them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import KFold

NUM_FOLDS = 3
MIN_PROMPTS_PER_CLUSTER = 5

Array = NDArray[np.float64]


def coordinates(x: Array) -> Array:
    """Standardised x [N, D]; if D > N rotated into its N principal axes, where distances are the same."""
    scale = x.std(axis=0)
    scale[scale == 0] = 1.0
    z = (x - x.mean(axis=0)) / scale  # otherwise the few huge dimensions of hidden states would decide alone
    if z.shape[1] <= z.shape[0]:
        return z
    left, singular, _ = np.linalg.svd(z, full_matrices=False)
    return left * singular


def largest_number(x: Array, max_clusters: int) -> int:
    """How many clusters may be tried: none of fewer than 5 distinct prompts on average."""
    return max(1, min(max_clusters, len(np.unique(x, axis=0)) // MIN_PROMPTS_PER_CLUSTER))


def choose_num_clusters(
    y: Array, largest: int, seed: int, log_likelihoods: Callable[[Array, Array, int], Array]
) -> int:
    """The smallest K whose cross-validated log-likelihood is within one standard error of the best.

    The rule of Breiman et al. (1984, "Classification and Regression Trees", 3.4.3), on paired differences:
    without it, chance splits a cluster now and then.

    Args:
        y: [N, r] coordinates.
        largest: K that is tried last.
        seed: of the folds.
        log_likelihoods: (train, test, K) -> nats of each row of ``test``, up to a constant.
    """
    if largest == 1:
        return 1
    fit = np.empty((largest, len(y)))
    for train, test in KFold(NUM_FOLDS, shuffle=True, random_state=seed).split(y):
        for k in range(largest):
            fit[k, test] = log_likelihoods(y[train], y[test], k + 1)
    loss = fit[fit.mean(axis=1).argmax()] - fit  # [largest, N] nats worse than the best K
    close = loss.mean(axis=1) <= loss.std(axis=1, ddof=1) / len(y) ** 0.5
    return int(close.argmax()) + 1
