"""Signature mean: the nearest class mean, in units of the spread within the tasks along each dimension.

The least that can stand for a task: it is what mixtures have to beat.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from trace_dist.bank.signature import Clusters

label = "one mean per task, one variance per dimension for all tasks"
likelihood = "variances"


def fit(x: NDArray[np.float64], max_clusters: int, seed: int) -> Clusters:
    """The mean of x [N, D]; of ``factor`` [1, D] the squares are the sums of squares around it."""
    mean = x.mean(axis=0, keepdims=True)
    factor = torch.from_numpy(np.sqrt(np.square(x - mean).sum(axis=0, keepdims=True)))
    return Clusters(torch.from_numpy(mean), torch.tensor([len(x)]), factor)
