"""The kinds of signature: against references, on disk, side by side in a bank, and from outside the package."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from bank.samples import small_delta
from safetensors import safe_open
from scipy import stats

from trace_dist import DeltaBank
from trace_dist.bank.density import Mixture
from trace_dist.bank.facts import kind_of
from trace_dist.bank.merge import merge
from trace_dist.bank.retrieval import Retriever
from trace_dist.bank.signature import Clusters, Signature, fit_signature
from trace_dist.bank.signatures import full, mixtures
from trace_dist.bank.verify import verify
from trace_dist.parts import SIGNATURES

KINDS = list(SIGNATURES)


def draw(task: int, num: int, seed: int = 0, dim: int = 12) -> torch.Tensor:
    """[num, dim] prompts of a task of two clusters, with dimensions of very different units."""
    centres = 4 * torch.randn(2, dim, generator=torch.Generator().manual_seed(100 + task))
    generator = torch.Generator().manual_seed(1000 * task + seed)
    x = centres[torch.arange(num) % 2] + torch.randn(num, dim, generator=generator)
    return x * torch.logspace(-1, 2, dim)


def fitted(kind: str, num_tasks: int = 3, num: int = 64, dim: int = 12) -> list[Signature]:
    return [fit_signature(draw(t, num, dim=dim), 2, 0, f"t{t}", kind=kind) for t in range(num_tasks)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [12, 100])
def test_every_kind_retrieves_survives_the_disk_and_is_deterministic(
    kind: str, dim: int, tmp_path: Path
) -> None:
    signatures = fitted(kind, dim=dim)
    retriever = Retriever(signatures)
    fresh = torch.cat([draw(t, 60, 9, dim) for t in range(3)])
    confusion = retriever.confusion(fresh, torch.arange(3).repeat_interleave(60))
    assert confusion.trace() >= 175
    assert fitted(kind, 1, dim=dim)[0].same(signatures[0])
    for signature in signatures:
        path = tmp_path / f"{signature.task}.safetensors"
        signature.save(path)
        read = Signature.load(path)
        assert read.same(signature)
        assert (read.task, read.kind, read.likelihood) == (
            signature.task,
            kind,
            SIGNATURES.load(kind).likelihood,
        )
    loaded = Retriever(Signature.load(tmp_path / f"t{t}.safetensors") for t in range(3))
    # Not bit by bit: a matrix product depends on how its factors lie in memory.
    torch.testing.assert_close(loaded.scores(fresh), retriever.scores(fresh), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dim", [16, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_far_from_all_others_are_no_obstacle(kind: str, dim: int) -> None:
    x = torch.randn(60, dim, generator=torch.Generator().manual_seed(1))
    x[7] += 30
    x[8] -= 30
    signature = fit_signature(x, 4, 0, "t", kind=kind)
    assert int(signature.counts.sum()) == 45
    assert Mixture.of(signature).log_density(x).isfinite().all()


@pytest.mark.parametrize("kind", ["diagonal", "full", "dirichlet", "kmeans"])
def test_two_clusters_are_found(kind: str) -> None:
    assert fit_signature(draw(0, 120), 3, 0, "t", kind=kind).num_clusters == 2
    assert fit_signature(draw(0, 120), 1, 0, "t", kind=kind).num_clusters == 1


@pytest.mark.parametrize("dim", [6, 60])
@pytest.mark.parametrize("kind", KINDS)
def test_densities_equal_scipys(kind: str, dim: int) -> None:
    """Covariances written out in full, also where there are fewer prompts than dimensions."""
    signature = fit_signature(draw(0, 48, dim=dim), 2, 0, "t", kind=kind)
    mixture = Mixture.of(signature)
    x = draw(0, 10, 5, dim)
    expected = np.zeros((10, signature.num_clusters))
    for k, mean in enumerate(signature.means.double().numpy()):
        std, factor, ridge = (
            each[min(k, len(each) - 1)].numpy() for each in (mixture.std, mixture.cholesky, mixture.ridge)
        )
        axes = mixture.axes.numpy()
        along = axes.T @ factor @ factor.T @ axes
        covariance = np.diag(std) @ (along + ridge * (np.eye(dim) - axes.T @ axes)) @ np.diag(std)
        density = stats.multivariate_normal(mean, covariance, allow_singular=False)
        expected[:, k] = np.log(signature.weights[k].item()) + density.logpdf(x.double().numpy())
    np.testing.assert_allclose(mixture.log_density(x), np.logaddexp.reduce(expected, axis=1), rtol=1e-4)


def test_a_mixture_knows_spreads_that_a_shared_covariance_does_not() -> None:
    """Two tasks around one mean, one of them wide: only densities of their own can tell them apart."""
    generator = torch.Generator().manual_seed(0)

    def prompts(std: float, num: int) -> torch.Tensor:
        return std * torch.randn(num, 10, generator=generator)

    x = torch.cat([prompts(1, 300), prompts(4, 300)])
    labels = torch.arange(2).repeat_interleave(300)
    right = {}
    for kind in ("kmeans", "diagonal", "full"):
        pair = [fit_signature(prompts(std, 120), 1, 0, str(std), kind=kind) for std in (1, 4)]
        right[kind] = Retriever(pair).confusion(x, labels).trace().item() / 600
    assert right["kmeans"] < 0.7 < 0.95 < min(right["diagonal"], right["full"])


@pytest.mark.parametrize("kind", ["full", "dirichlet"])
def test_a_difference_in_a_direction_of_small_variance_is_seen(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shrinkage that suits one Gaussian drowns it; left-out prompts ask for less."""
    dim, spectrum = 20, torch.logspace(0, -3, 20)
    axes = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(7)))[0]

    def prompts(task: int, seed: int) -> torch.Tensor:
        z = torch.randn(300, dim, generator=torch.Generator().manual_seed(seed))
        z[:, -1] += 3 * task
        return z * spectrum @ axes

    def accuracy() -> float:
        pair = [fit_signature(prompts(task, task), 1, 0, str(task), kind=kind) for task in range(2)]
        fresh = torch.cat([prompts(task, 10 + task) for task in range(2)])
        labels = torch.arange(2).repeat_interleave(300)
        return Retriever(pair).confusion(fresh, labels).trace().item() / 600

    assert accuracy() > 0.8
    monkeypatch.setattr(mixtures, "STRENGTHS", (1.0,))
    assert accuracy() < 0.6


def test_one_gaussian_is_shrunk_as_it_suits_one() -> None:
    x = np.random.default_rng(0).standard_normal((40, 60))
    scale = mixtures.spread(x)
    axes = mixtures.principal_axes((x - x.mean(axis=0)) / scale)
    expected = mixtures.shrunk(x, scale, axes, np.ones((40, 1)), 1.0)
    torch.testing.assert_close(full.fit(x, 1, 0).extra["ridge"], expected.extra["ridge"])


def test_the_default_kind_is_written_as_by_earlier_releases(tmp_path: Path) -> None:
    """Which compare a task that is learned again byte by byte, and refuse a version that they do not know."""
    fitted("kmeans", 1)[0].save(tmp_path / "signature.safetensors")
    with safe_open(str(tmp_path / "signature.safetensors"), "pt") as file:
        header = json.loads(file.metadata()["header"])
        assert set(file.keys()) == {"means", "counts", "factor", "heldout"}
    assert header.keys() == {"format", "version", "task", "checksum", "header_checksum"}
    assert header["version"] == 1
    assert kind_of({"clusters": 1, "dim": 3}) == ("kmeans", "covariance")


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_old_tasks_changes_when_one_is_added(kind: str, tmp_path: Path) -> None:
    def files() -> dict[Path, str]:
        return {
            path: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (tmp_path / "tasks").rglob("*.safetensors")
        }

    bank = DeltaBank.create(tmp_path, "aaaa", layer=1)
    signatures = fitted(kind)
    bank.add(signatures[0], small_delta("t0", 0))
    bank.add(signatures[1], small_delta("t1", 1))
    before, facts = files(), [bank.facts(f"t{t}") for t in range(2)]
    bank.add(signatures[2], small_delta("t2", 2))
    after = files()
    assert len(after) == 6
    assert before.items() <= after.items()
    assert [bank.facts(f"t{t}") for t in range(2)] == facts
    assert verify(bank) == []
    assert bank.retrieve(draw(2, 4, 7)) == ["t2"] * 4


def test_kinds_of_one_likelihood_share_a_bank_and_others_are_refused(tmp_path: Path) -> None:
    message = "bank.signature='kmeans': compares tasks by covariance, but the bank holds signatures of 'full', which"
    bank = DeltaBank.create(tmp_path / "bank", "aaaa", layer=1)
    full, diagonal, kmeans = (
        fit_signature(draw(t, 80), 2, 0, f"t{t}", kind=kind)
        for t, kind in enumerate(("full", "diagonal", "kmeans"))
    )
    bank.add(full, small_delta("t0", 0))
    bank.add(diagonal, small_delta("t1", 1))
    assert bank.retrieve(torch.cat([draw(0, 3, 5), draw(1, 3, 5)])) == ["t0"] * 3 + ["t1"] * 3
    with pytest.raises(ValueError, match=message):
        bank.add(kmeans, small_delta("t2", 2))
    with pytest.raises(ValueError, match=message):
        Retriever([full, kmeans])
    bank.check_kind("dirichlet")
    with pytest.raises(ValueError, match=r"bank\.signature='mean': compares tasks by variances"):
        bank.check_kind("mean")
    assert bank.tasks == ["t0", "t1"]
    other = DeltaBank.create(tmp_path / "other", "aaaa", layer=1)
    other.add(kmeans, small_delta("t2", 2))
    with pytest.raises(ValueError, match=message):
        merge(bank, other, tmp_path / "both")


def test_what_has_no_density_is_refused_where_one_is_fitted() -> None:
    for kind in ("full", "diagonal", "dirichlet"):
        with pytest.raises(ValueError, match="distinct prompts"):
            fit_signature(torch.ones(20, 4), 2, 0, "same", kind=kind)
        few = draw(0, 12, dim=6)[torch.arange(120) % 12]  # 12 distinct prompts, ten times each
        assert Retriever([fit_signature(few, 4, 0, "few", kind=kind)]).scores(few).isfinite().all()
    with pytest.raises(ValueError, match=r"bank\.signature='nearest': there is no such part"):
        fit_signature(torch.randn(20, 4), 2, 0, "t", kind="nearest")


def test_a_density_that_lacks_a_part_is_refused() -> None:
    whole = fitted("full", 1)[0]
    for extra in ({}, {**whole.extra, "ridge": torch.tensor([torch.nan])}):
        with pytest.raises(ValueError, match=r"signature 't0': of likelihood 'density' .*; fit it again"):
            replace(whole, extra=extra)
    with pytest.raises(ValueError, match="of likelihood 'covariance'"):
        replace(fitted("kmeans", 1)[0], extra=whole.extra)


def test_a_kind_of_your_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    part = ModuleType("my.kind")
    part.likelihood = "variances"  # type: ignore[attr-defined]

    def fit(x: np.ndarray, max_clusters: int, seed: int) -> Clusters:
        middle = torch.from_numpy(np.median(x, axis=0))[None]
        factor = torch.from_numpy(np.abs(x - middle.numpy()).sum(axis=0))[None]
        return Clusters(middle, torch.tensor([len(x)]), factor)

    part.fit = fit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my", ModuleType("my"))
    monkeypatch.setitem(sys.modules, "my.kind", part)
    mine = fit_signature(draw(0, 60), 1, 0, "mine", kind="my.kind")
    mine.save(tmp_path / "s.safetensors")
    monkeypatch.undo()
    # It is read without its module: what is compared is its likelihood.
    retriever = Retriever([Signature.load(tmp_path / "s.safetensors"), fitted("mean", 2)[1]])
    assert retriever.predict(draw(1, 5, 3)).tolist() == [1] * 5
