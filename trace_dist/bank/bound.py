"""How often can retrieval pick a wrong task? Two upper limits, from the signatures' held-out prompts.

[Note: the Gaussian bound] A prompt x from cluster i of task s goes wrong only if some cluster j of another
task scores at least as high, so by the union bound, with the margin h_ij = score_i - score_j (an affine
function of x, because the clusters share one covariance),

    P(wrong | i)  <=  sum_j P(h_ij <= 0)  =  sum_j Q(m_ij / sqrt(v_ij)),     Q(z) = P(N(0, 1) > z)

when the clusters are Gaussian. Were the fitted means mu and covariance the true ones, m = Delta^2 / 2 +
log(w_i / w_j) and v = Delta^2 with Delta the Mahalanobis distance |mu_i - mu_j|: the classical error
Q(Delta / 2 + log(w_i / w_j) / Delta) (Hastie, Tibshirani, Friedman, "Elements of Statistical Learning",
4.3), so well separated clusters retrieve reliably (PROTEUS, arXiv 2603.13235). But fitted means lie further
apart than true ones: with 100 prompts in 576 dimensions, error 0.6 %, that formula promises 0.000 %. So m
and v are estimated on held-out prompts, and replaced by confidence limits.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import mul, truediv

import torch
from scipy import stats
from torch import Tensor

from trace_dist.bank.retrieval import Retriever

CONFIDENCE = 0.95


@dataclass(frozen=True)
class ErrorBound:
    """Limits on the share of prompts that are sent to a wrong task; fractions in [0, 1].

    "Total" means a prompt drawn from the tasks in proportion to their held-out prompts (equal, if all tasks
    were given equally many). All limits hold for new prompts drawn like the held-out ones; none covers a
    shift between them.
    """

    tasks: tuple[str, ...]
    num_heldout: tuple[int, ...]
    """Held-out prompts per task."""
    heldout_error: tuple[float, ...]
    """Observed error per task."""
    heldout_limit: tuple[float, ...]
    """Upper 95 % limit per task (each by itself), Clopper-Pearson: assumes independent prompts alone."""
    gaussian_limit: tuple[float, ...]
    """Upper 95 % limit per task (all at once), `gaussian_limits`: assumes Gaussian clusters."""
    heldout_error_total: float
    heldout_limit_total: float
    gaussian_limit_total: float

    def to_json(self) -> dict[str, object]:
        """For `results.json`, in percent; ``error_bound`` is the total limit that assumes no distribution."""

        def percent(values: tuple[float, ...]) -> list[float]:
            return [100 * value for value in values]

        return {
            "tasks": list(self.tasks),
            "confidence": 100 * CONFIDENCE,
            "num_heldout": list(self.num_heldout),
            "error_bound": 100 * self.heldout_limit_total,
            "heldout_error": 100 * self.heldout_error_total,
            "gaussian_error_bound": 100 * self.gaussian_limit_total,
            "heldout_error_per_task": percent(self.heldout_error),
            "error_bound_per_task": percent(self.heldout_limit),
            "gaussian_error_bound_per_task": percent(self.gaussian_limit),
        }


def clopper_pearson_upper(num_errors: int, num_trials: int, confidence: float = CONFIDENCE) -> float:
    """Exact one-sided upper confidence limit for an error probability.

    For trials of unequal probabilities the limit holds for their mean (Hoeffding 1956, theorem 4: their sum
    is less spread than a binomial), as long as it exceeds (num_errors + 1) / num_trials; beyond that 1.0 is
    returned.

    Raises:
        ValueError: not 0 <= num_errors <= num_trials.
    """
    if not 0 <= num_errors <= num_trials:
        raise ValueError(f"num_errors={num_errors}: must lie in [0, num_trials={num_trials}]; count again")
    if num_errors == num_trials:
        return 1.0
    limit = float(stats.beta.ppf(confidence, num_errors + 1, num_trials - num_errors))
    return limit if limit * num_trials >= num_errors + 1 else 1.0


def _score_lower_limits(
    mean: Tensor, variance: Tensor, counts: Tensor, num_samples: int, level: float
) -> Tensor:
    """Lower limits for m / sqrt(v), each missed with probability at most ``level``.

    The mean and the variance of a Gaussian sample are independent; half the level is spent on each. A mean
    at or below 0 gives -inf (no claim).
    """
    variance_upper = variance * num_samples / float(stats.chi2.ppf(level / 2, num_samples))
    limit = mean / variance_upper.sqrt() - float(stats.norm.isf(level / 2)) / counts.sqrt()
    return torch.where(mean > 0, limit, -torch.inf)


def gaussian_limits(retriever: Retriever) -> Tensor:
    """Upper limits on each task's error under Gaussian clusters; see [Note: the Gaussian bound].

    Assumes that, around the cluster means, held-out and future prompts are Gaussian with one covariance
    (not that the fitted one is right), that a task's own clusters hardly overlap, and takes the held-out
    shares of the clusters as known. The confidence is split over all pairs of clusters (Bonferroni), so all
    limits hold together.

    Returns:
        [T] float64 in [0, 1]; 1 where there are too few held-out prompts to tell.

    Raises:
        ValueError: the retriever is empty.
    """
    signatures = retriever.signatures
    means, log_prior = torch.cat(retriever.whitened_means()), torch.cat(retriever.log_priors())
    num_clusters = torch.tensor([signature.num_clusters for signature in signatures])
    owner = torch.arange(len(signatures)).repeat_interleave(num_clusters)  # task of each cluster
    white = torch.cat([retriever.gaussian.whiten(signature.heldout) for signature in signatures])
    task = torch.arange(len(signatures)).repeat_interleave(torch.tensor([len(s.heldout) for s in signatures]))

    linear = white @ means.T  # [H, C]; the score without |x|^2 / 2, which cancels in every margin
    scores = linear + log_prior - means.square().sum(dim=1) / 2
    cluster = scores.where(task[:, None] == owner, -torch.inf).argmax(dim=1)  # [H] nearest own cluster
    member = torch.nn.functional.one_hot(cluster, len(owner)).double()  # [H, C]
    counts = member.sum(dim=0)
    num_samples = len(white) - int((counts > 0).sum())
    if num_samples < 1:
        return torch.ones(len(signatures), dtype=torch.float64)

    # [C, C]: mean score of cluster j on the prompts of cluster i, and by how much i's own score is larger
    average = member.T @ scores / counts.clamp(min=1)[:, None]
    margin = average.diagonal()[:, None] - average
    residual = linear - member @ (member.T @ linear / counts.clamp(min=1)[:, None])
    covariance = residual.T @ residual / num_samples
    spread = covariance.diagonal()[:, None] + covariance.diagonal() - 2 * covariance  # of the margins
    rival = owner[:, None] != owner
    level = (1 - CONFIDENCE) / max(1, int(rival.sum()))
    limit = _score_lower_limits(margin, spread.clamp(min=0), counts[:, None], num_samples, level)
    wrong = torch.special.ndtr(-limit).where(rival, 0.0).sum(dim=1).clamp(max=1)  # [C]
    shares = counts / torch.zeros(len(signatures), dtype=torch.float64).index_add(0, owner, counts)[owner]
    return torch.zeros(len(signatures), dtype=torch.float64).index_add(0, owner, shares * wrong)


def error_bound(retriever: Retriever) -> ErrorBound:
    """Limits on the retrieval error of the present bank, from the held-out parts of its signatures.

    Call it again after adding a task: new competitors change the error of earlier tasks.

    Raises:
        ValueError: the retriever is empty.
    """
    signatures = retriever.signatures
    num_errors = [int((retriever.predict(s.heldout) != index).sum()) for index, s in enumerate(signatures)]
    num_heldout = [len(s.heldout) for s in signatures]
    gaussian = gaussian_limits(retriever).tolist()
    trials = sum(num_heldout)
    return ErrorBound(
        tasks=tuple(retriever.tasks),
        num_heldout=tuple(num_heldout),
        heldout_error=tuple(map(truediv, num_errors, num_heldout)),
        heldout_limit=tuple(map(clopper_pearson_upper, num_errors, num_heldout)),
        gaussian_limit=tuple(gaussian),
        heldout_error_total=sum(num_errors) / trials,
        heldout_limit_total=clopper_pearson_upper(sum(num_errors), trials),
        gaussian_limit_total=sum(map(mul, gaussian, num_heldout)) / trials,
    )
