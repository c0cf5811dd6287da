"""Are the prompts around their clusters Gaussian, as one of the error limits assumes? Mardia's test.

With S the covariance of N rows r_i in p dimensions, g_ij = r_i^T S^-1 r_j (Mardia 1970, "Measures of multivariate skewness
and kurtosis with applications", Biometrika 57; 1974 for the corrected skewness):

    b_1 = mean_ij g_ij^3,   N b_1 c / 6 ~ chi^2 with p (p + 1) (p + 2) / 6 degrees of freedom
    b_2 = mean_i g_ii^2,    (b_2 - p (p + 2)) / sqrt(8 p (p + 2) / N) ~ N(0, 1)

if the rows are Gaussian. With z_i the rows in coordinates in which S is the identity, b_1 is the squared length of the mean of
z_i (x) z_i (x) z_i, which takes p^3 numbers of each row, not N. Both are the same in any coordinates; the test is taken on a few
principal components of the held-out prompts around their nearest cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trace_dist.bank.signature import Signature

NUM_COMPONENTS = 5
MAX_ROWS = 2000
"""Rows that are looked at, evenly drawn: the same memory for a bank of any size."""


@dataclass(frozen=True)
class Mardia:
    """What the test found."""

    skewness: float
    """b_1; 0 for a Gaussian."""
    kurtosis: float
    """b_2 / (p (p + 2)); 1 for a Gaussian, more where far prompts are frequent."""
    p_value: float
    """Of the less likely one, times 2 (Bonferroni): small where the prompts are not Gaussian."""
    num_rows: int
    num_components: int


def mardia(x: Tensor) -> Mardia:
    """Mardia's test.

    Args:
        x: [N, p] float64 rows.

    Raises:
        ValueError: too few rows, or they do not span p dimensions.
    """
    from scipy import stats  # slow to import, and needed at the end alone

    num, dim = x.shape
    centred = x - x.mean(dim=0)
    factor, info = torch.linalg.cholesky_ex(centred.T @ centred / num)
    if num <= dim + 1 or int(info):
        raise ValueError(
            f"normality: {num} rows do not span {dim} dimensions; give more and distinct prompts"
        )
    white = torch.linalg.solve_triangular(factor, centred.T, upper=False).T
    skewness = torch.einsum("ia,ib,ic->abc", white, white, white).div(num).square().sum().item()
    kurtosis = white.square().sum(dim=1).square().mean().item()
    correction = (dim + 1) * (num + 1) * (num + 3) / (num * ((num + 1) * (dim + 1) - 6))
    freedom = dim * (dim + 1) * (dim + 2) / 6
    p_skewness = float(stats.chi2.sf(num * skewness * correction / 6, freedom))
    expected = dim * (dim + 2)
    p_kurtosis = float(2 * stats.norm.sf(abs(kurtosis - expected) / (8 * expected / num) ** 0.5))
    return Mardia(skewness, kurtosis / expected, min(1.0, 2 * min(p_skewness, p_kurtosis)), num, dim)


def residuals(signatures: Sequence[Signature]) -> Tensor:
    """Held-out prompts minus the mean of their task's nearest cluster, in units of their spread: [N, D] float64, N at most
    ``MAX_ROWS``."""
    gaps, ends = [], np.cumsum([len(signature.heldout) for signature in signatures])
    chosen = np.linspace(0, ends[-1] - 1, min(MAX_ROWS, ends[-1])).astype(int)
    for signature, end in zip(signatures, ends, strict=True):
        begin = end - len(signature.heldout)
        rows = torch.from_numpy(chosen[(begin <= chosen) & (chosen < end)] - begin)
        x, means = signature.heldout.double(), signature.means.double()
        scale = x.std(dim=0, correction=0) if len(x) > 1 else torch.ones(signature.dim, dtype=torch.float64)
        scale = scale.where(scale > 0, torch.ones_like(scale))
        x = x[rows]
        gaps.append(x - means[torch.cdist(x / scale, means / scale).argmin(dim=1)])
    found = torch.cat(gaps)
    spread = found.square().mean(dim=0).sqrt()
    return found / spread.where(spread > 0, torch.ones_like(spread))


def normality(signatures: Sequence[Signature]) -> Mardia | None:
    """Mardia's test on the held-out prompts of a bank; None where they are too few or have no spread."""
    rows = residuals(signatures)
    rows = rows - rows.mean(dim=0)
    _, singular, axes = torch.linalg.svd(rows, full_matrices=False)
    num_components = min(NUM_COMPONENTS, int((singular > 1e-6 * singular[0]).sum()), len(rows) - 2)
    if num_components < 1:
        return None
    return mardia(rows @ axes[:num_components].T)
