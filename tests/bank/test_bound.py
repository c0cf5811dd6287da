"""The two error limits: exact where theory is exact, never below the error in simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from trace_dist.bank.bound import CONFIDENCE, clopper_pearson_upper, error_bound, gaussian_limits
from trace_dist.bank.retrieval import Retriever
from trace_dist.bank.signature import Signature, fit_signature


class Mixture:
    """Tasks of Gaussian clusters with one random covariance, means about ``distance`` apart in its metric."""

    def __init__(self, num_tasks: int, num_clusters: int, dim: int, distance: float, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        mixing = self._normal(dim, dim) / dim**0.5
        self.factor = torch.linalg.cholesky(mixing @ mixing.T / 2 + torch.eye(dim, dtype=torch.float64) / 2)
        self.means = self._normal(num_tasks, num_clusters, dim) * distance / (2 * dim) ** 0.5

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def draw(self, task: int, num: int) -> Tensor:
        """[num, D] float64 prompts of a task."""
        _, num_clusters, dim = self.means.shape
        cluster = torch.randint(num_clusters, (num,), generator=self.generator)
        return (self.means[task, cluster] + self._normal(num, dim)) @ self.factor.T

    def fitted(self, num: int) -> Retriever:
        return Retriever(
            fit_signature(self.draw(t, num).float(), 3, 0, str(t)) for t in range(len(self.means))
        )

    def errors(self, retriever: Retriever, num: int) -> Tensor:
        """[T] observed error on fresh prompts."""
        wrong = [(retriever.predict(self.draw(t, num)) != t).double().mean() for t in range(len(self.means))]
        return torch.stack(wrong)


def true_signature(task: str, means: Tensor, counts: list[int], heldout: Tensor) -> Signature:
    """A signature of true parameters: identity covariance, from so many prompts that it is not shrunk."""
    num_samples = sum(counts) - len(counts)
    factor = math.sqrt(num_samples) * torch.eye(means.shape[1])
    return Signature(task, means.float(), torch.tensor(counts), factor, heldout.float())


@pytest.mark.parametrize(
    ("num_tasks", "num_clusters", "dim", "num", "distance"),
    [(3, 1, 8, 400, 5), (3, 2, 8, 400, 6), (4, 1, 64, 200, 6), (3, 2, 64, 100, 8)],
)
def test_gaussian_limit_is_above_the_error(
    num_tasks: int, num_clusters: int, dim: int, num: int, distance: float
) -> None:
    for seed in range(8):
        mixture = Mixture(num_tasks, num_clusters, dim, distance, seed)
        retriever = mixture.fitted(num)
        errors, limits = mixture.errors(retriever, 2000), gaussian_limits(retriever)
        assert (errors <= limits).all(), (seed, errors, limits)


def test_gaussian_limit_holds_with_fewer_prompts_than_dimensions() -> None:
    """The formula with fitted distances promises nearly 0 here, and is broken."""
    plug_in_broken = 0
    for seed in range(2):
        mixture = Mixture(3, 1, 576, 7.0, seed)
        retriever = mixture.fitted(100)
        errors, limits = mixture.errors(retriever, 2000), gaussian_limits(retriever)
        assert (errors <= limits).all(), (seed, errors, limits)
        assert limits.max() < 0.5  # it does say something
        means = torch.cat(retriever.whitened_means())
        plug_in = torch.special.ndtr(-torch.cdist(means, means) / 2).fill_diagonal_(0).sum(dim=1)
        plug_in_broken += int((errors > plug_in).sum())
    assert plug_in_broken >= 3


def test_gaussian_limit_tends_to_the_textbook_error() -> None:
    """True parameters, many held-out prompts: Q(Delta / 2 +- log ratio / Delta), weighted over clusters."""
    generator = torch.Generator().manual_seed(0)
    dim, num = 4, 200_000
    means = [torch.ones(2, dim), torch.ones(1, dim)]
    means[0][1, 0] += 40.0  # far away: never wrong
    means[1][0, 1] += 3.0  # Delta = 3 from the first cluster of the first task
    counts = [[20_000, 60_000], [80_000]]
    signatures = []
    for task in range(2):
        cluster = torch.tensor([0, 1, 1, 1] if task == 0 else [0]).repeat(num)[:num]
        heldout = means[task][cluster] + torch.randn(num, dim, generator=generator)
        signatures.append(true_signature(str(task), means[task], counts[task], heldout))
    limits = gaussian_limits(Retriever(signatures))
    first = 0.25 * stats.norm.sf(3 / 2 + math.log(0.25) / 3)
    second = stats.norm.sf(3 / 2 - math.log(0.25) / 3)
    for limit, exact in zip(limits.tolist(), (first, second), strict=True):
        assert exact < limit < 1.08 * exact


def test_bounds_without_enough_evidence_say_so() -> None:
    lonely = Retriever([true_signature("a", torch.zeros(1, 3), [50], torch.zeros(1, 3))])
    assert gaussian_limits(lonely).tolist() == [1.0]  # one prompt has no spread
    same = Mixture(2, 1, 5, 0.0, 0).fitted(100)  # two tasks that are one
    assert (gaussian_limits(same) > 0.5).all()
    only = Mixture(1, 1, 5, 0.0, 0).fitted(100)
    assert gaussian_limits(only).tolist() == [0.0]  # no other task to be sent to


@pytest.mark.parametrize("num_trials", [1, 2, 10, 100])
def test_clopper_pearson_covers_every_error_rate(num_trials: int) -> None:
    """Exact, by summing the binomial over the outcomes whose limit misses the truth."""
    limits = np.array([clopper_pearson_upper(k, num_trials) for k in range(num_trials + 1)])
    assert (np.diff(limits) >= 0).all()
    for rate in np.linspace(0.001, 0.999, 200):
        missed = stats.binom.pmf(np.arange(num_trials + 1), num_trials, rate)[limits < rate].sum()
        assert missed <= 1 - CONFIDENCE + 1e-12


def test_clopper_pearson_covers_the_mean_of_unequal_rates() -> None:
    """Exact, by convolving the tasks' binomials (Poisson-binomial); the last one needs the limit of 1.0."""
    cases = [
        (20, 0.0, 0.01, 0.3),
        (20, 0.5, 0.01, 0.01),
        (20, 1.0, 0.0, 0.0),
        (20, 0.9, 0.8, 0.99),
        (1, 1.0, 0.9495),
    ]
    for num_trials, *rates in cases:
        pmf, total = np.ones(1), num_trials * len(rates)
        for rate in rates:
            pmf = np.convolve(pmf, stats.binom.pmf(np.arange(num_trials + 1), num_trials, rate))
        limits = np.array([clopper_pearson_upper(k, total) for k in range(total + 1)])
        assert pmf[limits < np.mean(rates)].sum() <= 1 - CONFIDENCE


def test_clopper_pearson_known_values() -> None:
    assert clopper_pearson_upper(0, 100) == pytest.approx(1 - 0.05 ** (1 / 100))
    assert clopper_pearson_upper(5, 50) == pytest.approx(
        stats.binomtest(5, 50).proportion_ci(0.90, method="exact").high
    )
    assert clopper_pearson_upper(7, 7) == 1.0
    with pytest.raises(ValueError, match="num_errors=3"):
        clopper_pearson_upper(3, 2)


def test_heldout_limit_covers_the_true_error_after_fitting() -> None:
    """Fewer of these limits than the 10^-4 quantile of true 95 % coverage may miss."""
    covered, covered_total, num_limits = 0, 0, 0
    for seed in range(50):
        mixture = Mixture(3, 1, 6, 3.0, seed)
        retriever = mixture.fitted(60)
        errors, bound = mixture.errors(retriever, 4000), error_bound(retriever)
        covered += int((errors <= torch.tensor(bound.heldout_limit)).sum())
        covered_total += int(errors.mean() <= bound.heldout_limit_total)
        num_limits += len(errors)
    assert num_limits == 150
    assert covered >= stats.binom.ppf(1e-4, num_limits, CONFIDENCE)
    assert covered_total >= stats.binom.ppf(1e-4, 50, CONFIDENCE)


def test_error_bound_counts_and_json() -> None:
    mixture = Mixture(3, 1, 6, 3.0, 0)
    retriever = mixture.fitted(80)
    bound = error_bound(retriever)
    wrong = [
        (retriever.predict(signature.heldout) != task).double().mean().item()
        for task, signature in enumerate(retriever.signatures)
    ]
    assert bound.num_heldout == (20, 20, 20)
    assert bound.heldout_error == tuple(wrong)
    assert bound.heldout_error_total == pytest.approx(np.mean(wrong))
    assert bound.heldout_limit_total < max(bound.heldout_limit)  # three times the evidence
    assert bound.gaussian_limit_total == pytest.approx(np.mean(bound.gaussian_limit))
    report = bound.to_json()
    assert report["tasks"] == ["0", "1", "2"]
    assert report["error_bound"] == pytest.approx(100 * bound.heldout_limit_total)
    assert report["error_bound_per_task"] == pytest.approx([100 * limit for limit in bound.heldout_limit])


def test_a_new_task_changes_the_limits_of_the_old_ones() -> None:
    mixture = Mixture(3, 1, 6, 4.0, 1)
    retriever = mixture.fitted(120)
    before = error_bound(retriever)
    twin = fit_signature(mixture.draw(0, 120).float(), 3, 0, "twin")
    retriever.add(twin)
    after = error_bound(retriever)
    assert before.heldout_error[0] < 0.2 < after.heldout_error[0]
    assert before.gaussian_limit[0] < 0.5 < after.gaussian_limit[0]
