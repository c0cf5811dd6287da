"""Bounds from means and covariances: exact where theory is, kept on fresh prompts, and broken where their assumption is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from trace_dist.bank.bound import cantelli_limits, error_bound, gaussian_limits, separation_bounds
from trace_dist.bank.normality import mardia, residuals
from trace_dist.bank.retrieval import Retriever
from trace_dist.bank.signature import Signature, fit_signature

DIM = 4


def leaping(
    task: int, num: int, generator: torch.Generator, distance: float = 8.0, rare: float = 0.05
) -> Tensor:
    """[num, DIM] fp32 of unit covariance: one prompt in twenty lies near the other task, as far as Cantelli's bound allows."""
    noise = torch.randn(num, DIM, generator=generator)
    leap = math.sqrt((1 - rare) / rare)
    leaps = torch.rand(num, generator=generator) < rare
    noise[:, 0] = torch.where(leaps, torch.full((num,), leap), torch.full((num,), -rare / (1 - rare) * leap))
    sign = 1 - 2 * task
    return noise * sign + torch.tensor([-sign * distance / 2, 0, 0, 0])


def gaussian(task: int, num: int, generator: torch.Generator, distance: float = 4.0) -> Tensor:
    """[num, DIM] fp32: the tasks' means lie on a line, ``distance`` apart."""
    x = torch.randn(num, DIM, generator=generator)
    x[:, 0] += task * distance
    return x


def errors(retriever: Retriever, fresh: list[Tensor]) -> Tensor:
    wrong = [(retriever.predict(x) != task).double().mean() for task, x in enumerate(fresh)]
    return torch.stack(wrong)


def fitted(draw: object, num_tasks: int, num: int, seed: int = 0, kind: str = "kmeans") -> Retriever:
    generator = torch.Generator().manual_seed(seed)
    return Retriever(
        fit_signature(draw(t, num, generator), 1, 0, str(t), kind=kind)  # type: ignore[operator]
        for t in range(num_tasks)
    )


def test_separation_equals_the_formulas_written_out() -> None:
    weights = [[1, 3], [4]]
    means = [torch.tensor([[0.0, 0.0, 0.0], [0.0, 6.0, 0.0]]), torch.tensor([[3.0, 0.0, 0.0]])]
    scale = 1000
    signatures = []
    for task, (mean, weight) in enumerate(zip(means, weights, strict=True)):
        counts = torch.tensor(weight) * scale
        factor = math.sqrt(int(counts.sum()) - len(weight)) * torch.eye(3)
        signatures.append(Signature(str(task), mean, counts, factor, torch.zeros(2, 3)))
    found = separation_bounds(Retriever(signatures))
    tails = (stats.norm.sf, lambda z: 1 / (1 + z**2))
    for bound, tail in zip(found, tails, strict=True):

        def wrong(distance: float, ratio: float, tail: object = tail) -> float:
            return tail(distance / 2 + math.log(ratio) / distance)  # type: ignore[operator,no-any-return]

        far = math.sqrt(45)
        first = 0.25 * wrong(3, 0.25) + 0.75 * wrong(far, 0.75)
        second = wrong(3, 4) + wrong(far, 4 / 3)
        assert bound.tolist() == pytest.approx([first, second], rel=1e-6)


@pytest.mark.parametrize("distance", [3.0, 4.0, 5.0])
def test_all_bounds_hold_on_gaussian_prompts(distance: float) -> None:
    def draw(task: int, num: int, generator: torch.Generator) -> Tensor:
        return gaussian(task, num, generator, distance)

    retriever = fitted(draw, 3, 4000)
    generator = torch.Generator().manual_seed(99)
    num = 40_000
    found = errors(retriever, [draw(task, num, generator) for task in range(3)])
    noise = 4 * (found / num).sqrt()
    normal, any_shape = separation_bounds(retriever)
    for bound in (normal, any_shape, gaussian_limits(retriever), cantelli_limits(retriever)):
        assert (found - noise <= bound).all(), (found, bound)
    # The Gaussian bound is the error itself but for the union over two neighbours; Cantelli's is far above it.
    assert (normal <= 1.25 * found + noise).all()
    assert (any_shape > 3 * found).all()
    assert error_bound(retriever).normality.p_value > 1e-3  # type: ignore[union-attr]


def test_gaussian_bounds_break_on_prompts_that_leap_and_the_others_hold() -> None:
    retriever = fitted(leaping, 2, 4000)
    generator = torch.Generator().manual_seed(99)
    found = errors(retriever, [leaping(task, 40_000, generator) for task in range(2)])
    normal, any_shape = separation_bounds(retriever)
    assert (found > 0.045).all()
    assert (normal < 0.001).all()
    assert (gaussian_limits(retriever) < 0.001).all()
    assert (found <= any_shape).all()
    assert (found <= cantelli_limits(retriever)).all()
    assert (any_shape < 1.5 * found).all()  # this is what it is for: it is nearly attained here
    bound = error_bound(retriever)
    assert found.max() <= max(bound.heldout_limit)
    assert bound.normality is not None
    assert bound.normality.p_value < 1e-6


def test_cantellis_bound_of_margins_that_are_all_the_same() -> None:
    """However far away the other task is: a ratio of mean and deviation would be infinite."""
    for distance in (10.0, 1e8):
        mean = torch.tensor([[0.0, 0.0], [distance, 0.0]])
        signatures = [
            Signature(
                str(task), mean[task][None], torch.tensor([100]), 10 * torch.eye(2), mean[task].repeat(4, 1)
            )
            for task in range(2)
        ]
        assert cantelli_limits(Retriever(signatures)).tolist() == [1 / 5, 1 / 5]


def test_skewness_is_that_over_all_pairs() -> None:
    x = torch.randn(201, 3, generator=torch.Generator().manual_seed(0)).double().exp()
    centred = x - x.mean(dim=0)
    pairs = centred @ torch.linalg.inv(centred.T @ centred / 201) @ centred.T
    found = mardia(x)
    assert found.skewness == pytest.approx(pairs.pow(3).mean().item())
    assert found.kurtosis == pytest.approx(pairs.diagonal().square().mean().item() / 15)


def test_no_more_rows_are_looked_at_in_a_larger_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trace_dist.bank.normality.MAX_ROWS", 60)
    signatures = fitted(leaping, 9, 80).signatures
    rows = residuals(signatures)
    assert len(rows) == 60 < sum(len(signature.heldout) for signature in signatures)
    assert len(residuals(signatures[:1])) == len(signatures[0].heldout)


def test_cantellis_limit_allows_for_few_heldout_prompts() -> None:
    """Ten held-out margins often hold no leap; without the correction the limit would be below the error on average."""
    limits, plain, found = [], [], []
    for seed in range(40):
        retriever = fitted(leaping, 2, 40, seed)
        generator = torch.Generator().manual_seed(1000 + seed)
        found.append(errors(retriever, [leaping(task, 1000, generator) for task in range(2)]).mean().item())
        limits.append(cantelli_limits(retriever).mean().item())
        for task, signature in enumerate(retriever.signatures):
            scores = retriever.scores(signature.heldout)
            margin = scores[:, task] - scores[:, 1 - task]
            plain.append((margin.var(correction=0) / (margin.var(correction=0) + margin.mean() ** 2)).item())
    assert np.mean(limits) >= np.mean(found)
    assert min(limits) >= 1 / 11 - 1e-9
    assert np.mean(limits) > np.mean(plain)


def test_kinds_with_densities_of_their_own_have_the_bounds_that_need_no_shared_covariance() -> None:
    retriever = fitted(gaussian, 3, 400, kind="full")
    bound = error_bound(retriever)
    generator = torch.Generator().manual_seed(99)
    found = errors(retriever, [gaussian(task, 4000, generator) for task in range(3)])
    assert bound.gaussian_limit == bound.separation == bound.separation_any == (1.0, 1.0, 1.0)
    assert (found <= torch.tensor(bound.cantelli_limit)).all()
    assert max(bound.cantelli_limit) < 0.5
    assert max(bound.heldout_limit) < 0.15
    report = bound.to_json()
    total = np.average(bound.cantelli_limit, weights=bound.num_heldout)
    assert report["cantelli_error_bound"] == pytest.approx(100 * total)
    assert report["separation_estimate"] == 100


def test_mardia_in_one_dimension_is_skewness_and_kurtosis() -> None:
    x = torch.empty(300, 1, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(0))
    found = mardia(x)
    assert found.skewness == pytest.approx(stats.skew(x[:, 0].numpy()) ** 2)
    assert found.kurtosis == pytest.approx(stats.kurtosis(x[:, 0].numpy(), fisher=False) / 3)
    assert found.p_value < 1e-6
    with pytest.raises(ValueError, match="do not span 3 dimensions"):
        mardia(torch.ones(50, 3, dtype=torch.float64))


def test_mardia_rejects_as_often_as_it_says_and_in_any_coordinates() -> None:
    generator = torch.Generator().manual_seed(0)
    rejected, repeats = 0, 200
    for _ in range(repeats):
        x = torch.randn(120, 3, generator=generator, dtype=torch.float64)
        found = mardia(x)
        rejected += found.p_value < 0.05
    assert rejected <= stats.binom.ppf(1 - 1e-4, repeats, 0.05)
    mixing = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    assert mardia(x @ mixing + 7).skewness == pytest.approx(found.skewness)
    heavy = x / torch.empty(120, 1, dtype=torch.float64).exponential_(generator=generator).sqrt()
    assert mardia(heavy).p_value < 0.01
