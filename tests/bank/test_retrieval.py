"""Signatures and retrieval: against brute force, in high dimensions, on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.covariance import OAS

from trace_dist.bank.bound import error_bound
from trace_dist.bank.gaussian import SharedGaussian, shrinkage_intensity
from trace_dist.bank.retrieval import Retriever
from trace_dist.bank.signature import Signature, fit_signature


def blobs(centres: torch.Tensor, num: int, seed: int, std: torch.Tensor | float = 1.0) -> torch.Tensor:
    """[num, D] fp32: isotropic Gaussians around the rows of ``centres``, in turn."""
    generator = torch.Generator().manual_seed(seed)
    picked = centres[torch.arange(num) % len(centres)]
    return picked + std * torch.randn(num, centres.shape[1], generator=generator)


def two_clusters(task: int, dim: int = 12) -> torch.Tensor:
    """[2, dim] cluster centres of a task."""
    return 4 * torch.randn(2, dim, generator=torch.Generator().manual_seed(100 + task))


def three_tasks(dim: int = 12, num: int = 120) -> list[Signature]:
    return [
        fit_signature(blobs(two_clusters(task, dim), num, task), 4, 0, name)
        for task, name in enumerate(("sum", "sort", "spell"))
    ]


# The shared covariance


def test_shrinkage_agrees_with_scikit_learn() -> None:
    x = np.random.default_rng(0).normal(size=(60, 200)) @ np.diag(np.linspace(1, 3, 200))
    covariance = torch.from_numpy(x.T @ x / len(x))
    reference = OAS(assume_centered=True).fit(x)  # drops terms of relative size 2 / D
    assert shrinkage_intensity(covariance, len(x), 200) == pytest.approx(reference.shrinkage_, rel=0.02)


def test_shrunk_covariance_beats_the_sample_and_the_diagonal() -> None:
    dim, num = 40, 60
    lags = torch.arange(dim).double()
    truth = 0.6 ** (lags - lags[:, None]).abs()
    x = torch.randn(num, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x @ torch.linalg.cholesky(truth).T
    gaussian = SharedGaussian.from_scatter(x.T @ x, num)
    factor = gaussian.std[:, None] * gaussian.cholesky
    sample = x.T @ x / num

    def error(estimate: torch.Tensor) -> float:
        return (estimate - truth).norm().item()

    assert 0 < gaussian.shrinkage < 1
    assert error(factor @ factor.T) < min(error(sample), error(sample.diagonal().diag()))
    assert gaussian.log_det == pytest.approx(torch.logdet(factor @ factor.T).item())


def test_a_dimension_without_spread_is_survived() -> None:
    x = blobs(torch.zeros(1, 5), 100, 0)
    x[:, 2] = 7.0
    white = SharedGaussian.from_scatter((x - x.mean(0)).double().T @ (x - x.mean(0)).double(), 99).whiten(x)
    assert white.isfinite().all()
    with pytest.raises(ValueError, match="distinct prompts"):
        SharedGaussian.from_scatter(torch.zeros(3, 3, dtype=torch.float64), 9)
    with pytest.raises(ValueError, match="degrees of freedom"):
        SharedGaussian.from_scatter(torch.eye(3, dtype=torch.float64), 0)


# Signatures


@pytest.mark.parametrize("dim", [20, 576])
@pytest.mark.parametrize("num_clusters", [1, 2, 3])
def test_number_of_clusters_is_found(num_clusters: int, dim: int) -> None:
    for seed in range(2):
        spread = torch.randn(num_clusters, dim, generator=torch.Generator().manual_seed(seed))
        x = blobs(spread * 12 / (2 * dim) ** 0.5, 240, seed)
        assert fit_signature(x, 4, seed, "t").num_clusters == num_clusters
        assert fit_signature(x, 1, seed, "t").num_clusters == 1


def test_chance_does_not_split_a_cluster() -> None:
    """Without the one-standard-error rule one of these becomes three clusters."""
    centres = 12 * torch.eye(2)
    found = [fit_signature(blobs(centres, 80, seed), 4, seed, "t").num_clusters for seed in range(8)]
    assert found == [2] * 8


def test_signature_holds_exact_statistics_and_untouched_prompts() -> None:
    x = blobs(two_clusters(0), 100, 0)
    signature = fit_signature(x, 2, 0, "t", heldout_share=0.2)
    assert len(signature.heldout) == 20
    is_heldout = (x[:, None] == signature.heldout).all(dim=2).any(dim=1)
    fit = x[~is_heldout].double()
    assert int(is_heldout.sum()) == 20
    assert signature.counts.sum() == len(fit) == signature.num_samples + 2
    nearest = torch.cdist(fit, signature.means.double()).argmin(dim=1)
    means = torch.stack([fit[nearest == cluster].mean(dim=0) for cluster in range(2)])
    torch.testing.assert_close(signature.means.double(), means, rtol=1e-6, atol=1e-6)
    residual = fit - means[nearest]
    torch.testing.assert_close(signature.scatter, residual.T @ residual, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(signature.weights, torch.bincount(nearest).double() / len(fit))


def test_repeated_prompts_are_not_split_into_points() -> None:
    few = blobs(torch.zeros(1, 6), 12, 0)[torch.arange(120) % 12]  # 12 distinct prompts, ten times each
    signature = fit_signature(few, 4, 0, "few")
    assert signature.num_clusters <= 2
    assert Retriever([signature]).scores(few).isfinite().all()
    same = fit_signature(torch.ones(20, 6), 4, 0, "same")
    assert same.num_clusters == 1
    assert Retriever([signature, same]).predict(torch.ones(1, 6)).item() == 1
    # Of points alone the nearest wins.
    point = fit_signature(torch.full((20, 6), 2.0), 4, 0, "point")
    assert Retriever([same]).predict(few).tolist() == [0] * len(few)
    assert Retriever([same, point]).predict(torch.tensor([[1.1] * 6, [1.9] * 6])).tolist() == [0, 1]


def test_fit_is_deterministic_and_depends_on_the_seed() -> None:
    x = blobs(two_clusters(0), 60, 0)
    one, same, other = (fit_signature(x, 3, seed, "t") for seed in (0, 0, 1))
    assert torch.equal(one.means, same.means)
    assert torch.equal(one.factor, same.factor)
    assert not torch.equal(one.heldout, other.heldout)


@pytest.mark.parametrize(
    ("x", "changed", "message"),
    [
        (torch.randn(7, 4), {}, r"representations are \(7, 4\).*num_prompts"),
        (torch.randn(9), {}, "must be"),
        (torch.full((20, 4), torch.nan), {}, "finite"),
        (torch.randn(20, 4), {"max_clusters": 0}, r"bank\.clusters=0"),
        (torch.randn(20, 4), {"heldout_share": 0.0}, "heldout_share=0.0"),
    ],
)
def test_fit_refuses(x: torch.Tensor, changed: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_signature(x, **{"max_clusters": 1, "seed": 0, "task": "t"} | changed)  # type: ignore[arg-type]


# Retrieval


def test_scores_equal_the_formula_written_out() -> None:
    signatures = three_tasks()
    retriever = Retriever(signatures)
    x = blobs(torch.cat([two_clusters(task) for task in range(3)]), 30, 9)
    gaussian = retriever.gaussian
    factor = gaussian.std[:, None] * gaussian.cholesky
    precision = torch.linalg.inv(factor @ factor.T).numpy()
    expected = np.full((30, 3), -np.inf)
    for task, signature in enumerate(signatures):
        for mean, weight in zip(signature.means.double().numpy(), signature.weights, strict=True):
            gap = x.double().numpy() - mean
            score = np.log(weight.item() / 3) - 0.5 * np.einsum("nd,de,ne->n", gap, precision, gap)
            expected[:, task] = np.maximum(expected[:, task], score)
    np.testing.assert_allclose(retriever.scores(x).numpy(), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(retriever.predict(x), torch.from_numpy(expected.argmax(axis=1)))
    ordered = np.sort(expected, axis=1)
    np.testing.assert_allclose(
        retriever.margin(x).numpy(), ordered[:, -1] - ordered[:, -2], rtol=1e-6, atol=1e-9
    )


def test_adding_a_task_later_equals_building_at_once() -> None:
    signatures = three_tasks()
    x = blobs(torch.cat([two_clusters(task) for task in range(3)]), 60, 9)
    grown = Retriever(signatures[:1])
    assert torch.equal(grown.predict(x), torch.zeros(60, dtype=torch.int64))
    assert grown.margin(x).isinf().all()
    for signature in signatures[1:]:
        grown.add(signature)
    assert grown.tasks == ["sum", "sort", "spell"]
    assert torch.equal(grown.scores(x), Retriever(signatures).scores(x))


def test_more_dimensions_than_prompts() -> None:
    dim, num = 576, 100
    scale = torch.logspace(-2, 3, dim)  # a few dimensions dwarf the others, as in language models
    directions = torch.randn(3, dim, generator=torch.Generator().manual_seed(5)) * 8 / dim**0.5
    draw = [blobs(directions[task : task + 1], num, task) * scale for task in range(3)]
    retriever = Retriever(fit_signature(x, 4, 0, str(task)) for task, x in enumerate(draw))
    fresh = torch.cat([blobs(directions[task : task + 1], 200, 50 + task) * scale for task in range(3)])
    confusion = retriever.confusion(fresh, torch.arange(3).repeat_interleave(200))
    assert confusion.sum(dim=1).tolist() == [200] * 3
    assert confusion.trace() >= 0.98 * 600
    assert retriever.scores(fresh).isfinite().all()


def test_prediction_does_not_depend_on_the_units_of_a_dimension() -> None:
    scale = torch.logspace(-2, 3, 12)
    x = blobs(torch.cat([two_clusters(task) for task in range(3)]), 60, 9)
    plain, scaled = (
        Retriever(
            fit_signature(blobs(two_clusters(task), 120, task) * s, 4, 0, str(task)) for task in range(3)
        )
        for s in (torch.ones(12), scale)
    )
    torch.testing.assert_close(plain.margin(x), scaled.margin(x * scale), rtol=1e-3, atol=1e-3)


def test_accuracy_is_near_the_best_possible() -> None:
    """Two known Gaussians at Mahalanobis distance 3: no rule errs less than Q(1.5) = 6.7 %."""
    centres = torch.zeros(2, 8)
    centres[1, 0] = 3.0
    retriever = Retriever(fit_signature(blobs(centres[t : t + 1], 400, t), 3, 0, str(t)) for t in range(2))
    fresh = torch.cat([blobs(centres[t : t + 1], 5000, 10 + t) for t in range(2)])
    confusion = retriever.confusion(fresh, torch.arange(2).repeat_interleave(5000))
    assert 0.058 < 1 - confusion.trace().item() / 10_000 < 0.078


def test_retriever_refuses() -> None:
    signatures = three_tasks()
    with pytest.raises(ValueError, match="holds no signature"):
        Retriever().predict(torch.zeros(1, 12))
    with pytest.raises(ValueError, match="'sum': the task is in the bank"):
        Retriever([signatures[0], signatures[0]])
    with pytest.raises(ValueError, match="hidden size 5, must be 12"):
        Retriever([signatures[0], fit_signature(torch.randn(20, 5), 1, 0, "narrow")])
    retriever = Retriever(signatures)
    for x in (torch.zeros(2, 5), torch.zeros(12), torch.full((1, 12), torch.inf)):
        with pytest.raises(ValueError, match="representations: shape"):
            retriever.predict(x)
    for labels in (torch.tensor([0]), torch.tensor([0, 3]), torch.tensor([0, -1])):
        with pytest.raises(ValueError, match="labels: shape"):
            retriever.confusion(torch.zeros(2, 12), labels)


# Files


def test_round_trip_is_bit_exact_and_as_small_as_promised(tmp_path: Path) -> None:
    dim, num = 576, 400
    signature = fit_signature(torch.randn(num, dim), 1, 0, "a b: ü")
    other = fit_signature(torch.randn(40, dim), 1, 0, "other")
    path = tmp_path / "signature.safetensors"
    signature.save(path)
    loaded = Signature.load(path)
    assert loaded.task == "a b: ü"
    for name in ("means", "counts", "factor", "heldout"):
        assert torch.equal(getattr(signature, name), getattr(loaded, name))
    assert error_bound(Retriever([loaded, other])) == error_bound(Retriever([signature, other]))
    assert signature.num_bytes == 4 * dim * (1 + 300 + 100) + 8
    assert signature.num_bytes < 0.9 * 2**20
    assert path.stat().st_size < signature.num_bytes + 2000


def test_bad_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "signature.safetensors"
    with pytest.raises(ValueError, match="no such signature file"):
        Signature.load(path)
    three_tasks(num=40)[0].save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="corrupt signature file"):
        Signature.load(path)
    for place in (100, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"corrupt signature file|not 'trace_dist\.signature'"):
            Signature.load(path)
