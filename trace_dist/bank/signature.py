"""A task's signature: clusters of its prompts' representations under the frozen base.

What is kept of a task is enough to add other tasks later without its data: cluster means and sizes, the
within-cluster scatter (as a factor), and a held-out part of the representations that no fit has seen. The
held-out part makes the distribution-free error limit possible (see ``bound``): the competitors of a task
are not known when it is learned.

Size in fp32: 4 D (K + min(N_fit, D) + N_heldout) bytes; D = 576 with 400 prompts: 0.9 MiB per task. Half
precision would halve it (on SmolLM2-135M, 8 tasks, no prediction changes, margins of 600 nats move by 0.4),
but some models have hidden states beyond what fp16 holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.model_selection import KFold
from torch import Tensor

from trace_dist.bank.gaussian import shrinkage_intensity
from trace_dist.utils.files import reading
from trace_dist.utils.sealed import load_sealed, save_sealed

FORMAT_VERSION = 1
TENSORS = ("means", "counts", "factor", "heldout")
NUM_FOLDS = 3
NUM_KMEANS_STARTS = 10
MIN_PROMPTS = 8
MIN_PROMPTS_PER_CLUSTER = 5
MIN_RIDGE = 1e-12  # in units of a standardised dimension's variance: duplicate prompts may leave no spread


@dataclass(frozen=True, eq=False)
class Signature:
    """Cluster model of one task; every tensor is on the CPU.

    Raises:
        ValueError: shapes disagree, a value is not finite, or a cluster is empty.
    """

    task: str
    means: Tensor
    """[K, D] fp32 cluster means."""
    counts: Tensor
    """[K] int64 prompts behind each mean."""
    factor: Tensor
    """[r, D] fp32, r <= D: factor^T factor is the sum of squares within the clusters."""
    heldout: Tensor
    """[H, D] fp32 representations that were used for nothing above."""

    def __post_init__(self) -> None:
        if not isinstance(self.task, str):
            raise ValueError(f"signature {self.task!r:.100}: its task is no name; fit it again")
        dim = self.means.shape[-1]
        shapes = {
            "means": (len(self.counts), dim),
            "factor": (len(self.factor), dim),
            "heldout": (len(self.heldout), dim),
        }
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            whole = tuple(tensor.shape) == shape and dim > 0 and tensor.is_floating_point()
            if not whole or not tensor.isfinite().all():
                raise ValueError(
                    f"signature {self.task!r}: {name} has shape {tuple(tensor.shape)}, "
                    f"must be finite and {shape}; fit it again"
                )
        counted = self.counts.ndim == 1 and self.counts.dtype == torch.int64
        if not counted or len(self.counts) == 0 or int(self.counts.min()) < 1:
            raise ValueError(
                f"signature {self.task!r}: counts={self.counts.tolist()!r:.100}, must be positive whole numbers; fit it again"
            )

    @property
    def dim(self) -> int:
        """Hidden size D."""
        return self.means.shape[1]

    @property
    def num_clusters(self) -> int:
        """K."""
        return len(self.means)

    @property
    def num_samples(self) -> int:
        """Degrees of freedom of the scatter: fitted prompts minus clusters."""
        return int(self.counts.sum()) - self.num_clusters

    @property
    def weights(self) -> Tensor:
        """[K] float64 shares of the clusters; they sum to 1."""
        return self.counts.double() / self.counts.sum()

    @property
    def scatter(self) -> Tensor:
        """[D, D] float64 within-cluster sum of squares."""
        factor = self.factor.double()
        return factor.T @ factor

    def save(self, path: Path) -> None:
        """Write the signature file."""
        header = {"format": "trace_dist.signature", "version": FORMAT_VERSION, "task": self.task}
        save_sealed(path, {name: getattr(self, name) for name in TENSORS}, header)

    @staticmethod
    def load(path: Path, digest: str | None = None) -> Signature:
        """Read a signature file, bit for bit.

        Args:
            path: the file.
            digest: SHA-256 of the file, where it is known.

        Raises:
            ValueError: missing, corrupt, of another kind, or of a newer version.
        """
        tensors, header = load_sealed(path, "signature", digest)
        if header.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"{path}: version {header.get('version')!r}, but this release reads {FORMAT_VERSION}; "
                "update trace_dist"
            )
        with reading(path, "signature"):
            return Signature(header["task"], *(tensors[name] for name in TENSORS))

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors on disk."""
        return sum(tensor.nbytes for tensor in (self.means, self.counts, self.factor, self.heldout))


def _coordinates(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standardised x [N, D]; if D > N rotated into its N principal axes, where distances are the same."""
    scale = x.std(axis=0)
    scale[scale == 0] = 1.0
    z = (x - x.mean(axis=0)) / scale  # otherwise the few huge dimensions of hidden states would decide alone
    if z.shape[1] <= z.shape[0]:
        return z
    left, singular, _ = np.linalg.svd(z, full_matrices=False)
    return left * singular


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


def _choose_num_clusters(y: NDArray[np.float64], max_clusters: int, seed: int, dim: int) -> int:
    """The smallest K whose cross-validated log-likelihood is within one standard error of the best.

    The rule of Breiman et al. (1984, "Classification and Regression Trees", 3.4.3), on paired differences:
    without it, chance splits a cluster now and then.
    """
    if max_clusters == 1:
        return 1
    fit = np.empty((max_clusters, len(y)))
    for train, test in KFold(NUM_FOLDS, shuffle=True, random_state=seed).split(y):
        for k in range(max_clusters):
            fit[k, test] = _log_likelihoods(y[train], y[test], k + 1, seed, dim)
    loss = fit[fit.mean(axis=1).argmax()] - fit  # [max_clusters, N] nats worse than the best K
    close = loss.mean(axis=1) <= loss.std(axis=1, ddof=1) / len(y) ** 0.5
    return int(close.argmax()) + 1


def fit_signature(
    x: Tensor, max_clusters: int, seed: int, task: str, heldout_share: float = 0.25
) -> Signature:
    """Fit a task's clusters.

    A random part of the prompts is set aside untouched. On the rest, K in 1..max_clusters is chosen by the
    log-likelihood of left-out folds under K-means clusters with one shrunk covariance, and K-means is then
    run on all of the rest. Dimensions are standardised for K-means; empty clusters and clusters of fewer
    than 5 prompts on average are not tried.

    Args:
        x: [N, D] representations of the task's prompts (``representation.represent``), N >= 8.
        max_clusters: largest K.
        seed: of the split, the folds and K-means; equal inputs give equal signatures.
        task: name of the task.
        heldout_share: share of the prompts set aside, in (0, 1).

    Raises:
        ValueError: too few prompts, a value that is not finite, or an argument out of range.
    """
    if x.ndim != 2 or len(x) < MIN_PROMPTS:
        raise ValueError(
            f"signature {task!r}: representations are {tuple(x.shape)}, must be [N >= {MIN_PROMPTS}, D]; "
            "raise bank.num_prompts or give the task more prompts"
        )
    if not x.isfinite().all():
        raise ValueError(
            f"signature {task!r}: representations must be finite; check the base model and bank.layer"
        )
    if max_clusters < 1:
        raise ValueError(f"bank.clusters={max_clusters}: must be at least 1; use for example 4")
    if not 0 < heldout_share < 1:
        raise ValueError(f"heldout_share={heldout_share}: must lie in (0, 1); use for example 0.25")
    order = np.random.default_rng(seed).permutation(len(x))
    num_heldout = min(max(1, round(heldout_share * len(x))), len(x) // 2)
    heldout, fit = order[:num_heldout], order[num_heldout:]
    values = x.detach().cpu().double().numpy()
    largest = max(1, min(max_clusters, len(np.unique(values[fit], axis=0)) // MIN_PROMPTS_PER_CLUSTER))
    y = _coordinates(values[fit])
    labels = _cluster(y, _choose_num_clusters(y, largest, seed, x.shape[1]), seed)
    means, counts, residuals = _moments(values[fit], labels)
    factor = torch.linalg.qr(residuals, mode="r").R  # same sum of squares, at most D rows, no row is a prompt
    return Signature(task, means.float(), counts, factor.float(), torch.from_numpy(values[heldout]).float())
