"""A task's signature: clusters of its prompts' representations, by one of the cluster models of ``bank.signatures``.

What is kept of a task is enough to add other tasks later without its data: cluster means and sizes, the
within-cluster scatter (as a factor) or a density of its own, and a held-out part of the representations that no fit
has seen. The held-out part makes the distribution-free error limit possible (see ``bound``): the competitors of a
task are not known when it is learned.

Size of the default kind in fp32: 4 D (K + min(N_fit, D) + N_heldout) bytes; D = 576 with 400 prompts: 0.9 MiB per
task. Half precision would halve it (on SmolLM2-135M, 8 tasks, no prediction changes, margins of 600 nats move by
0.4), but some models have hidden states beyond what fp16 holds.

[Note: likelihoods] What a retriever compares between tasks. Signatures of one likelihood may lie in one bank:
    covariance   distance to the nearest cluster under one covariance, which all tasks share
    variances    the same with the shared variances alone
    density      log density (nats) of the task's own mixture of Gaussians
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trace_dist.parts import SIGNATURES
from trace_dist.utils.files import reading
from trace_dist.utils.sealed import check_version, load_sealed, save_sealed

FORMAT_VERSION = 2
KIND, LIKELIHOOD = "kmeans", "covariance"
"""Of a signature file of version 1, which is also how such a signature is written today."""
TENSORS = ("means", "counts", "factor", "heldout")
DENSITY = ("std", "axes", "cholesky", "ridge")
"""What stands beside them where the likelihood is ``density`` (``density.Mixture``)."""
MIN_PROMPTS = 8
ROUNDING = 1e-5
"""Standard deviation, as a share of the mean, up to which representations of one prompt may differ between batches."""


@dataclass(frozen=True, eq=False)
class Clusters:
    """What a cluster model has found; see ``Signature`` for the fields."""

    means: Tensor
    counts: Tensor
    factor: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)


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
    """[r, D] fp32, r <= D: factor^T factor is the sum of squares within the clusters; [0, D] where ``extra`` has the spread."""
    heldout: Tensor
    """[H, D] fp32 representations that were used for nothing above."""
    kind: str = KIND
    """Name of the cluster model, a part of ``bank.signatures``."""
    likelihood: str = LIKELIHOOD
    """What is compared between tasks ([Note: likelihoods])."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors of a task's own density (``density.Mixture``)."""

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
        wanted = set(DENSITY) if self.likelihood == "density" else set()
        if self.extra.keys() != wanted or not all(tensor.isfinite().all() for tensor in self.extra.values()):
            raise ValueError(
                f"signature {self.task!r}: of likelihood {self.likelihood!r} with {sorted(self.extra)}, must have "
                f"{sorted(wanted)}, finite; fit it again"
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
    def has_spread(self) -> bool:
        """Whether prompts differ from the mean of their cluster by more than a model's rounding."""
        std = self.factor.double().norm(dim=0) / max(1, self.num_samples) ** 0.5
        return bool(self.extra) or bool((std > ROUNDING * self.means.double().abs().amax(dim=0)).any())

    @property
    def scatter(self) -> Tensor:
        """[D, D] float64 within-cluster sum of squares."""
        factor = self.factor.double()
        return factor.T @ factor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that is kept, by name."""
        return {name: getattr(self, name) for name in TENSORS} | dict(self.extra)

    def same(self, other: Signature) -> bool:
        """Whether two signatures hold the same bits, whatever their tasks are called."""
        mine, theirs = self.tensors, other.tensors
        alike = (self.kind, self.likelihood, mine.keys()) == (other.kind, other.likelihood, theirs.keys())
        return alike and all(torch.equal(mine[name], theirs[name]) for name in mine)

    def save(self, path: Path) -> None:
        """Write the signature file; the default kind as ever, so that what is learned again has the same bytes."""
        header = {"format": "trace_dist.signature", "version": 1, "task": self.task}
        if (self.kind, self.likelihood) != (KIND, LIKELIHOOD):
            header |= {"version": FORMAT_VERSION, "kind": self.kind, "likelihood": self.likelihood}
        save_sealed(path, self.tensors, header)

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
        check_version(header.get("version"), path, FORMAT_VERSION, 1)
        about = {key: header[key] for key in ("kind", "likelihood") if key in header}
        with reading(path, "signature"):
            parts: dict[str, Any] = {name: tensors.pop(name) for name in TENSORS}
            return Signature(header["task"], **parts, **about, extra=tensors)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors on disk."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def check_comparable(one: Signature | tuple[str, str], other: Signature | tuple[str, str]) -> None:
    """Raise ValueError unless two signatures may lie in one bank ([Note: likelihoods]).

    Args:
        one: the newer one, or its kind and likelihood.
        other: one that the bank holds.
    """
    (kind, ours), (held, theirs) = (
        each if isinstance(each, tuple) else (each.kind, each.likelihood) for each in (one, other)
    )
    if ours != theirs:
        raise ValueError(
            f"bank.signature={kind!r}: compares tasks by {ours}, but the bank holds signatures of {held!r}, which "
            f"compare by {theirs}; set bank.signature: {held}, or choose another bank"
        )


def _check(x: Tensor, max_clusters: int, task: str, heldout_share: float) -> None:
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


def parted(num: int, seed: int, heldout_share: float = 0.25) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which of ``num`` prompts a signature is fitted to, and which are held out of it: their places, in an order of the seed."""
    order = np.random.default_rng(seed).permutation(num)
    num_heldout = min(max(1, round(heldout_share * num)), num // 2)
    return order[num_heldout:], order[:num_heldout]


def fit_signature(
    x: Tensor, max_clusters: int, seed: int, task: str, heldout_share: float = 0.25, kind: str = KIND
) -> Signature:
    """Fit a task's clusters.

    A random part of the prompts is set aside untouched; the cluster model sees the rest.

    Args:
        x: [N, D] representations of the task's prompts (``representation.represent``), N >= 8.
        max_clusters: largest number of clusters.
        seed: of the split and the fit; equal inputs give equal signatures.
        task: name of the task.
        heldout_share: share of the prompts set aside, in (0, 1).
        kind: the cluster model, a part of ``bank.signatures``.

    Raises:
        ValueError: too few prompts, a value that is not finite, an argument out of range, or a kind that there is not.
    """
    part = SIGNATURES.load(kind)
    _check(x, max_clusters, task, heldout_share)
    fitted, kept_apart = parted(len(x), seed, heldout_share)
    values = x.detach().cpu().double().numpy()
    found: Clusters = part.fit(values[fitted], max_clusters, seed)
    heldout = torch.from_numpy(values[kept_apart]).float()
    # Laid out as a file gives them back: sums depend on it in their last bits.
    return Signature(
        task,
        found.means.float().contiguous(),
        found.counts,
        found.factor.float().contiguous(),
        heldout.contiguous(),
        kind,
        part.likelihood,
        found.extra,
    )
