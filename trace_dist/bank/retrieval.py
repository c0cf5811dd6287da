"""Which task does a prompt belong to? That of the nearest cluster; there is no router to train.

    score(x, t) = max over clusters k of task t of   log(w_k / T) - |x - mu_k|^2_Sigma / 2

with one covariance Sigma for all clusters, so the score is the log posterior of the best cluster up to a
constant of x. Retrieval by clusters of frozen-base representations follows PROTEUS (arXiv 2603.13235); the
shared covariance is ours: it is a sum over tasks, so a task is added from its signature alone and earlier
data is never needed again.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from trace_dist.bank.gaussian import SharedGaussian
from trace_dist.bank.signature import Signature

_MOST_DIRECT = 25
"""Prompts whose distances are added up one by one; those of more come from a product of matrices."""


class Retriever:
    """Maps representations to task indices, in the order in which the tasks' signatures were added.

    Args:
        signatures: of distinct tasks and one hidden size.

    Raises:
        ValueError: a task twice, or another hidden size.
    """

    def __init__(self, signatures: Iterable[Signature] = ()) -> None:
        self._signatures: list[Signature] = []
        self._scatter: Tensor | None = None  # [D, D] float64, not None iff there is a signature
        self._gaussian: SharedGaussian | None = None  # estimated when first needed after an `add`
        self._clusters: tuple[Tensor, Tensor, Tensor] | None = None  # as above
        for signature in signatures:
            self.add(signature)

    def add(self, signature: Signature) -> None:
        """Append a task; costs one [D, D] sum, and one Cholesky factor at the next use.

        Raises:
            ValueError: the task is known already, or its hidden size differs.
        """
        if signature.task in self.tasks:
            raise ValueError(
                f"signature {signature.task!r}: the task is in the bank already; remove the older one first"
            )
        if self._scatter is not None and signature.dim != len(self._scatter):
            raise ValueError(
                f"signature {signature.task!r}: hidden size {signature.dim}, must be {len(self._scatter)} "
                "as in the bank; fit it on the same base model"
            )
        self._scatter = signature.scatter if self._scatter is None else self._scatter + signature.scatter
        self._signatures.append(signature)
        self._gaussian = self._clusters = None

    @property
    def signatures(self) -> tuple[Signature, ...]:
        """The signatures, in order."""
        return tuple(self._signatures)

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in order."""
        return [signature.task for signature in self._signatures]

    @property
    def gaussian(self) -> SharedGaussian:
        """The shared covariance.

        Raises:
            ValueError: the retriever is empty.
        """
        if self._scatter is None:
            raise ValueError("retriever: holds no signature, must hold at least one; add a task first")
        if self._gaussian is None:
            num_samples = sum(signature.num_samples for signature in self._signatures)
            self._gaussian = SharedGaussian.from_scatter(self._scatter, num_samples)
        return self._gaussian

    def whitened_means(self) -> list[Tensor]:
        """Per task, [K, D] float64 cluster means in whitened coordinates."""
        return [self.gaussian.whiten(signature.means) for signature in self._signatures]

    def log_priors(self) -> list[Tensor]:
        """Per task, [K] float64 log(w_k / T): tasks are equally likely beforehand."""
        return [(signature.weights / len(self._signatures)).log() for signature in self._signatures]

    def clusters(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of all clusters: [C, D] whitened means, [C] log priors, [C] index of their task; kept until a task is added."""
        if self._clusters is None:
            owner = torch.repeat_interleave(torch.tensor([s.num_clusters for s in self._signatures]))
            self._clusters = torch.cat(self.whitened_means()), torch.cat(self.log_priors()), owner
        return self._clusters

    def scores(self, x: Tensor) -> Tensor:
        """Log posterior of each task's best cluster, up to a constant per row.

        Args:
            x: [N, D] representations, made like those of the signatures.

        Returns:
            [N, T] float64, nats.

        Raises:
            ValueError: no signature, wrong shape, or a value that is not finite.
        """
        dim = len(self.gaussian.std)
        if x.ndim != 2 or x.shape[1] != dim or not x.isfinite().all():
            raise ValueError(
                f"representations: shape {tuple(x.shape)}, must be finite and [N, {dim}]; use the bank's base"
            )
        white = self.gaussian.whiten(x.detach().cpu())
        means, log_prior, owner = self.clusters()
        # As torch chooses for the few clusters of one task: by the number of prompts.
        mode = "use_mm_for_euclid_dist" if len(white) > _MOST_DIRECT else "donot_use_mm_for_euclid_dist"
        joint = log_prior - torch.cdist(white, means, compute_mode=mode).square() / 2
        scores = joint.new_full((len(white), len(self._signatures)), -torch.inf)
        return scores.scatter_reduce_(1, owner.expand(len(white), -1), joint, "amax")

    def predict(self, x: Tensor) -> Tensor:
        """[N] int64 index of the task with the highest score for each row of x [N, D]."""
        return self.scores(x).argmax(dim=1)

    def margin(self, x: Tensor) -> Tensor:
        """[N] float64 nats between the best task and the second; inf where the bank holds one task."""
        scores = self.scores(x)
        if scores.shape[1] == 1:
            return torch.full((len(scores),), torch.inf, dtype=torch.float64)
        best = scores.topk(2, dim=1).values
        return best[:, 0] - best[:, 1]

    def confusion(self, x: Tensor, labels: Tensor) -> Tensor:
        """Counts of prompts by true task (row) and retrieved task (column).

        Args:
            x: [N, D] representations.
            labels: [N] integer task indices.

        Returns:
            [T, T] int64; the diagonal over the sum is the retrieval accuracy.

        Raises:
            ValueError: labels do not fit x or the tasks.
        """
        num_tasks = len(self._signatures)
        labels = labels.detach().cpu().to(torch.int64)
        if labels.shape != x.shape[:1] or not ((labels >= 0) & (labels < num_tasks)).all():
            raise ValueError(
                f"labels: shape {tuple(labels.shape)}, must be one index in [0, {num_tasks}) per row of x; "
                "give the tasks in the bank's order"
            )
        cells = labels * num_tasks + self.predict(x)
        return torch.bincount(cells, minlength=num_tasks**2).reshape(num_tasks, num_tasks)
