"""How often can retrieval pick a wrong task? Upper limits, by less and by more of an assumption; the last two are estimates.

| limit | from | assumes |
|---|---|---|
| `heldout` (Clopper-Pearson) | errors of held-out prompts | nothing of the distribution |
| `cantelli` | mean and variance of held-out margins | that these are the true ones |
| `gaussian` | the same, for each pair of clusters, with confidence limits | Gaussian clusters of one covariance |
| `separation` | cluster means, weights and covariance | Gaussian clusters, fitted parameters are the true ones |
| `separation_any` | the same | any clusters, fitted parameters are the true ones |

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

[Note: Cantelli's bound] For any random variable h with mean m > 0 and variance v, P(h <= 0) <= v / (v + m^2) (Cantelli
1928), and some distribution attains it. With the moments m and v (divisor n) of n held-out margins in place of the true
ones it would promise too much. Among n + 1 exchangeable margins, the inequality holds exactly for the distribution that
gives each of them the same weight; that the last one lies t = m / sqrt(v) of the others' standard deviations below
their mean means that it lies sqrt(n t^2 / (n + 1 + t^2)) of all margins' standard deviations below the mean of all
(as Saw, Yang and Mo 1984, "Chebyshev inequality with estimated mean and variance", for both sides). So

    P(h <= 0)  <~  1 / (1 + n t^2 / (n + 1 + t^2))  =  ((n + 1) v + m^2) / ((n + 1) (v + m^2))

which is at least 1 / (n + 1). It is exact for a t fixed beforehand; with the t that was found it is no confidence limit.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from operator import mul, truediv

import torch
from torch import Tensor

from trace_dist.bank.margins import cantelli, fitted_margins, gaussian, heldout_margins
from trace_dist.bank.normality import Mardia, normality
from trace_dist.bank.retrieval import Retriever

CONFIDENCE = 0.95
TINY = 1e-300
"""Least variance that is divided by."""


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
    cantelli_limit: tuple[float, ...]
    """Per task, `cantelli_limits`: assumes the held-out mean and variance of the margin alone."""
    separation: tuple[float, ...]
    """Per task, `separation_bounds` with Gaussian clusters: assumes that fitted parameters are the true ones."""
    separation_any: tuple[float, ...]
    """The same, whatever the clusters' distribution."""
    normality: Mardia | None
    """Whether held-out prompts look Gaussian around their clusters; None where they are too few to tell."""

    def total(self, values: tuple[float, ...]) -> float:
        """Of a prompt drawn from the tasks in proportion to their held-out prompts."""
        return sum(map(mul, values, self.num_heldout)) / sum(self.num_heldout)

    def to_json(self) -> dict[str, object]:
        """For `results.json`, in percent; ``error_bound`` is the total limit that assumes no distribution.

        What takes fitted parameters for the true ones is called an estimate: on real prompts it promises too much.
        """

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
            "cantelli_error_bound": 100 * self.total(self.cantelli_limit),
            "separation_estimate": 100 * self.total(self.separation),
            "separation_any_estimate": 100 * self.total(self.separation_any),
            "normality": None if self.normality is None else asdict(self.normality),
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
    from scipy import stats  # slow to import, and needed at the end alone

    limit = float(stats.beta.ppf(confidence, num_errors + 1, num_trials - num_errors))
    return limit if limit * num_trials >= num_errors + 1 else 1.0


def _score_lower_limits(
    mean: Tensor, variance: Tensor, counts: Tensor, num_samples: int, level: float
) -> Tensor:
    """Lower limits for m / sqrt(v), each missed with probability at most ``level``.

    The mean and the variance of a Gaussian sample are independent; half the level is spent on each. A mean
    at or below 0 gives -inf (no claim).
    """
    from scipy import stats  # slow to import, and needed at the end alone

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
        [T] float64 in [0, 1]; 1 where there are too few held-out prompts to tell, or tasks share no covariance.

    Raises:
        ValueError: the retriever is empty.
    """
    if not retriever.shares_covariance:
        return torch.ones(len(retriever.tasks), dtype=torch.float64)
    margins = heldout_margins(retriever)
    if margins.num_samples < 1:
        return torch.ones(len(retriever.tasks), dtype=torch.float64)
    level = (1 - CONFIDENCE) / max(1, int(margins.rival.sum()))
    limit = _score_lower_limits(
        margins.mean, margins.variance, margins.counts[:, None], margins.num_samples, level
    )
    return margins.union(gaussian(limit))


def separation_bounds(retriever: Retriever) -> tuple[Tensor, Tensor]:
    """Each task's error by the separation and spread of the clusters alone: with Gaussian clusters, and with any.

    Takes the fitted means, weights and covariance for the true ones, so it holds where there are many more prompts than
    dimensions, and promises too much where there are fewer ([Note: the Gaussian bound]).

    Returns:
        Two times [T] float64 in [0, 1]; 1 where tasks share no covariance.

    Raises:
        ValueError: the retriever is empty.
    """
    if not retriever.shares_covariance:
        none = torch.ones(len(retriever.tasks), dtype=torch.float64)
        return none, none
    margins = fitted_margins(retriever)
    standardised = margins.mean / margins.variance.sqrt().clamp(min=TINY)
    return margins.union(gaussian(standardised)), margins.union(cantelli(standardised))


def cantelli_limits(retriever: Retriever) -> Tensor:
    """Each task's error by the mean and variance of its held-out margins, whatever their distribution.

    The margin here is that of a prompt's own task over the best other one, which is at or below 0 where retrieval goes
    wrong; any kind of signature has it. See [Note: Cantelli's bound].

    Returns:
        [T] float64 in [0, 1].

    Raises:
        ValueError: the retriever is empty.
    """
    if len(retriever.tasks) == 1:
        return torch.zeros(1, dtype=torch.float64)
    limits = []
    for signature in retriever.signatures:
        margin = retriever.lead(signature.heldout, signature.task)
        mean, num = margin.mean(), len(margin) + 1
        # not by t, which is infinite for margins that are all the same
        mean_sq, variance = mean.square(), margin.var(correction=0)
        limit = (num * variance + mean_sq) / (num * (variance + mean_sq))
        limits.append(torch.where(mean > 0, limit, 1.0))
    return torch.stack(limits)


def heldout_errors(retriever: Retriever, index: int) -> int:
    """How many held-out prompts of a task another task is retrieved for."""
    return int((retriever.predict(retriever.signatures[index].heldout) != index).sum())


def error_bound(retriever: Retriever) -> ErrorBound:
    """Limits on the retrieval error of the present bank, from the held-out parts of its signatures.

    Call it again after adding a task: new competitors change the error of earlier tasks.

    Raises:
        ValueError: the retriever is empty.
    """
    signatures = retriever.signatures
    num_errors = [heldout_errors(retriever, index) for index in range(len(signatures))]
    num_heldout = [len(s.heldout) for s in signatures]
    limits = gaussian_limits(retriever).tolist()
    trials = sum(num_heldout)
    separation, separation_any = separation_bounds(retriever)
    return ErrorBound(
        tasks=tuple(retriever.tasks),
        num_heldout=tuple(num_heldout),
        heldout_error=tuple(map(truediv, num_errors, num_heldout)),
        heldout_limit=tuple(map(clopper_pearson_upper, num_errors, num_heldout)),
        gaussian_limit=tuple(limits),
        heldout_error_total=sum(num_errors) / trials,
        heldout_limit_total=clopper_pearson_upper(sum(num_errors), trials),
        gaussian_limit_total=sum(map(mul, limits, num_heldout)) / trials,
        cantelli_limit=tuple(cantelli_limits(retriever).tolist()),
        separation=tuple(separation.tolist()),
        separation_any=tuple(separation_any.tolist()),
        normality=normality(signatures),
    )
