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
        self._gaussian = None

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
        columns = [
            (log_prior - torch.cdist(white, means).square() / 2).amax(dim=1)
            for means, log_prior in zip(self.whitened_means(), self.log_priors(), strict=True)
        ]
        return torch.stack(columns, dim=1)

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
