"""How many clusters, how much shrinkage? As left-out prompts are best described by; coordinates in which to look for clusters."""

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
    """The smallest K that ``simplest`` allows.

    Args:
        y: [N, r] coordinates.
        largest: K that is tried last.
        seed: of the folds.
        log_likelihoods: (train, test, K) -> nats of each row of ``test``, up to a constant.
    """
    if largest == 1:
        return 1

    def of_each(train: Array, test: Array) -> Array:
        return np.stack([log_likelihoods(train, test, k + 1) for k in range(largest)])

    return simplest(y, seed, of_each) + 1


def simplest(y: Array, seed: int, log_likelihoods: Callable[[Array, Array], Array]) -> int:
    """The first of some models, the simplest first, whose cross-validated log-likelihood is within a standard error of the best.

    The rule of Breiman et al. (1984, "Classification and Regression Trees", 3.4.3), on paired differences:
    without it, chance splits a cluster now and then.

    Args:
        y: [N, r] coordinates.
        seed: of the folds.
        log_likelihoods: (train, test) -> [models, rows of ``test``] nats, up to a constant.
    """
    folds = list(KFold(NUM_FOLDS, shuffle=True, random_state=seed).split(y))
    left_out = np.concatenate([test for _, test in folds])
    fit = np.concatenate([log_likelihoods(y[train], y[test]) for train, test in folds], axis=1)
    fit = fit[:, left_out.argsort()]
    loss = fit[fit.mean(axis=1).argmax()] - fit  # [models, N] nats worse than the best
    close = loss.mean(axis=1) <= loss.std(axis=1, ddof=1) / len(y) ** 0.5
    return int(close.argmax())
