"""By how much does a prompt's own cluster score higher than one of another task? Means and variances of these margins.

The clusters share one covariance, so the margin h_ij = score_i - score_j is an affine function of the prompt, and the mean
and covariance of the prompts of cluster i are all that its mean m_ij and variance v_ij need. With the fitted means taken for
the true ones, and D_ij = |mu_i - mu_j| their Mahalanobis distance,

    m_ij = D_ij^2 / 2 + log(w_i / w_j),     v_ij = D_ij^2

How often the margin is at most 0 is then a matter of what is known of its distribution:

    gaussian   Q(m / sqrt(v)) = P(N(0, 1) > m / sqrt(v))
    cantelli   1 / (1 + m^2 / v), whatever the distribution (Cantelli 1928), where m > 0
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trace_dist.bank.retrieval import Retriever


def gaussian(standardised: Tensor) -> Tensor:
    """P(h <= 0) where h is Gaussian and its mean this many standard deviations above 0."""
    return torch.special.ndtr(-standardised)


def cantelli(standardised: Tensor) -> Tensor:
    """The largest P(h <= 0) among all distributions of h whose mean lies this many standard deviations above 0."""
    return torch.where(standardised > 0, 1 / (1 + standardised.square()), 1.0)


@dataclass(frozen=True, eq=False)
class Margins:
    """Margins between the C clusters of all tasks; float64. Those between clusters of one task mean nothing."""

    mean: Tensor
    """[C, C] of cluster i (row) over cluster j."""
    variance: Tensor
    """[C, C]."""
    owner: Tensor
    """[C] int64 index of the task of each cluster."""
    counts: Tensor
    """[C] prompts that each row stands for."""
    num_samples: int
    """Degrees of freedom of the variances."""

    @property
    def rival(self) -> Tensor:
        """[C, C] bool: the two clusters are of different tasks."""
        return self.owner[:, None] != self.owner

    def union(self, wrong: Tensor) -> Tensor:
        """[C, C] probabilities that cluster j wins -> [T], by the union bound over rivals and the shares of a task's clusters."""
        num_tasks = int(self.owner.max()) + 1
        each = wrong.where(self.rival, 0.0).sum(dim=1).clamp(max=1)
        total = torch.zeros(num_tasks, dtype=torch.float64).index_add(0, self.owner, self.counts)
        shares = self.counts / total[self.owner].clamp(min=1)
        return torch.zeros(num_tasks, dtype=torch.float64).index_add(0, self.owner, shares * each)


def _owner(retriever: Retriever) -> Tensor:
    num_clusters = torch.tensor([signature.num_clusters for signature in retriever.signatures])
    return torch.arange(len(num_clusters)).repeat_interleave(num_clusters)


def fitted_margins(retriever: Retriever) -> Margins:
    """Margins as they are where fitted means, weights and covariance are the true ones.

    Raises:
        ValueError: the retriever is empty, or its tasks share no covariance.
    """
    means, log_prior = torch.cat(retriever.whitened_means()), torch.cat(retriever.log_priors())
    distance_sq = torch.cdist(means, means).square()
    counts = torch.cat([signature.counts for signature in retriever.signatures]).double()
    mean = distance_sq / 2 + log_prior[:, None] - log_prior
    num_samples = sum(signature.num_samples for signature in retriever.signatures)
    return Margins(mean, distance_sq, _owner(retriever), counts, num_samples)


def heldout_margins(retriever: Retriever) -> Margins:
    """Margins of the held-out prompts, each counted to the nearest cluster of its task; one covariance for all.

    Raises:
        ValueError: the retriever is empty, or its tasks share no covariance.
    """
    signatures = retriever.signatures
    means, log_prior = torch.cat(retriever.whitened_means()), torch.cat(retriever.log_priors())
    owner = _owner(retriever)
    white = torch.cat([retriever.gaussian.whiten(signature.heldout) for signature in signatures])
    task = torch.arange(len(signatures)).repeat_interleave(torch.tensor([len(s.heldout) for s in signatures]))

    linear = white @ means.T  # [H, C]; the score without |x|^2 / 2, which cancels in every margin
    scores = linear + log_prior - means.square().sum(dim=1) / 2
    cluster = scores.where(task[:, None] == owner, -torch.inf).argmax(dim=1)  # [H] nearest own cluster
    member = torch.nn.functional.one_hot(cluster, len(owner)).double()  # [H, C]
    counts = member.sum(dim=0)
    num_samples = len(white) - int((counts > 0).sum())

    # [C, C]: mean score of cluster j on the prompts of cluster i, and by how much i's own score is larger
    average = member.T @ scores / counts.clamp(min=1)[:, None]
    margin = average.diagonal()[:, None] - average
    residual = linear - member @ (member.T @ linear / counts.clamp(min=1)[:, None])
    covariance = residual.T @ residual / max(1, num_samples)
    spread = covariance.diagonal()[:, None] + covariance.diagonal() - 2 * covariance
    return Margins(margin, spread.clamp(min=0), owner, counts, num_samples)
