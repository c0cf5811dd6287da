"""Rejection: the stated rate is kept on fresh prompts, and prompts of no task are found."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from bank.samples import small_delta
from scipy import stats

from trace_dist import DeltaBank
from trace_dist.bank.density import Mixture
from trace_dist.bank.rejection import Rejection, threshold
from trace_dist.bank.retrieval import Retriever
from trace_dist.bank.signature import fit_signature
from trace_dist.utils.names import BASE


def skewed(num: int, seed: int, dim: int = 6) -> torch.Tensor:
    """[num, dim] prompts of a task whose representations are far from Gaussian."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(num, dim).exponential_(generator=generator).pow(1.5)


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_the_stated_rate_is_kept_on_fresh_prompts(rate: float) -> None:
    """One fresh prompt for each of 250 banks: independent trials, k = rate * 40 of the 40 ranks among 39 held-out prompts."""
    repeats, rejected = 250, 0
    for seed in range(repeats):
        signature = fit_signature(skewed(79, seed), 1, 0, "t", heldout_share=0.5, kind="mean")
        rejected += int(Rejection(signature, rate).rejects(skewed(1, 1000 + seed)).sum())
    assert len(signature.heldout) == 39
    low, high = stats.binom.ppf([1e-4, 1 - 1e-4], repeats, rate)
    assert 0 < low <= rejected <= high


@pytest.mark.parametrize("kind", ["kmeans", "diagonal", "full", "dirichlet"])
def test_every_kind_keeps_the_rate(kind: str) -> None:
    """200 fresh prompts for each of 12 banks, whose rates vary like Beta(8, 32)."""
    repeats, num, rates = 12, 200, []
    for seed in range(repeats):
        signature = fit_signature(skewed(79, seed), 1, 0, "t", heldout_share=0.5, kind=kind)
        rates.append(Rejection(signature, 0.2).rejects(skewed(num, 1000 + seed)).double().mean().item())
    deviation = stats.betabinom(num, 8, 32).std() / num / repeats**0.5
    assert abs(np.mean(rates) - 0.2) < 4 * deviation < 0.1


def test_the_rate_of_one_task_varies_as_theory_says() -> None:
    """Rates of single banks against Beta(k, H + 1 - k), by a Kolmogorov-Smirnov test."""
    rates = []
    for seed in range(40):
        signature = fit_signature(skewed(59, seed), 1, 0, "t", heldout_share=0.5, kind="mean")
        rates.append(Rejection(signature, 0.2).rejects(skewed(4000, 500 + seed)).double().mean().item())
    num_heldout = len(signature.heldout)
    rank = math.floor(0.2 * (num_heldout + 1))
    assert stats.kstest(rates, stats.beta(rank, num_heldout + 1 - rank).cdf).pvalue > 1e-3


def test_threshold_is_the_rank_among_heldout_prompts(caplog: pytest.LogCaptureFixture) -> None:
    signature = fit_signature(skewed(160, 0), 2, 0, "t")
    densities = np.sort(Mixture.of(signature).log_density(signature.heldout).numpy())
    assert len(densities) == 40
    for rate, rank in ((0.05, 2), (0.1, 4), (0.5, 20)):
        assert threshold(signature, rate) == densities[rank - 1]
    assert threshold(signature, 0.02) == -math.inf
    assert "reject=0.02: needs 49 held-out prompts of a task, and t kept 40" in caplog.text
    assert not Rejection(signature, 0.02).rejects(torch.full((1, 6), 1e6)).any()
    for rate in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"bank\.reject=.*must lie in \(0, 1\)"):
            threshold(signature, rate)


def test_prompts_of_no_task_go_to_the_base(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(centre: float, num: int) -> torch.Tensor:
        return centre + torch.randn(num, 8, generator=generator)

    bank = DeltaBank.create(tmp_path, "aaaa", layer=1)
    bank.add(fit_signature(draw(0, 80), 1, 0, "near"), small_delta("near", 1))
    bank.add(fit_signature(draw(10, 80), 1, 0, "far"), small_delta("far", 2))
    strange = draw(40, 20)
    assert bank.retrieve(strange) == ["far"] * 20
    assert bank.retrieve(strange, reject=0.05) == [BASE] * 20
    own = bank.retrieve(draw(0, 400), reject=0.1)
    assert set(own) == {"near", BASE}
    assert 0 < own.count(BASE) / 400 < 0.3


def test_a_threshold_does_not_change_when_tasks_are_added() -> None:
    first = fit_signature(skewed(80, 0), 2, 0, "first")
    x, task = skewed(50, 3), torch.zeros(50, dtype=torch.int64)
    alone = Retriever([first]).rejects(x, task, 0.1)
    both = Retriever([first, fit_signature(skewed(80, 1) + 5, 2, 0, "second")])
    assert torch.equal(both.rejects(x, task, 0.1), alone)


@pytest.mark.parametrize("kind", ["kmeans", "mean"])
def test_a_task_of_one_prompt_is_retrieved_and_never_rejected(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where its representations differ by rounding, and where the bank holds nothing else."""
    generator = torch.Generator().manual_seed(0)
    one, other = (
        torch.randn(1, 6, generator=generator) * (1 + 1e-7 * torch.randn(40, 1, generator=generator))
        for _ in range(2)
    )
    fits = [fit_signature(x, 3, 0, name, kind=kind) for name, x in (("one", one), ("other", other))]
    wide = fit_signature(skewed(40, 0), 3, 0, "wide", kind=kind)
    for signatures in (fits[:1], fits, [*fits, wide]):
        retriever = Retriever(signatures)
        assert retriever.retrieve(one, reject=0.1) == ["one"] * 40
        if len(signatures) > 1:
            assert retriever.retrieve(other, reject=0.1) == ["other"] * 40
    assert threshold(fits[0], 0.1) == -math.inf
    assert "reject=0.1: the prompts of one are all the same" in caplog.text
