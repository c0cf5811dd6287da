"""Which task does a prompt belong to? That of the nearest cluster; there is no router to train.

    score(x, t) = max over clusters k of task t of   log(w_k / T) - |x - mu_k|^2_Sigma / 2

with one covariance Sigma for all clusters, so the score is the log posterior of the best cluster up to a
constant of x. Retrieval by clusters of frozen-base representations follows PROTEUS (arXiv 2603.13235); the
shared covariance is ours: it is a sum over tasks, so a task is added from its signature alone and earlier
data is never needed again. That is the default kind of signature; others have variances alone in common, or a density
of their own ([Note: likelihoods] in bank/signature.py).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from trace_dist.bank.comparison import COMPARISONS, Comparison, Shared
from trace_dist.bank.gaussian import SharedGaussian
from trace_dist.bank.rejection import Rejection
from trace_dist.bank.signature import Signature, check_comparable
from trace_dist.utils.names import BASE


def _comparison(signature: Signature) -> Comparison:
    if signature.likelihood not in COMPARISONS:
        raise ValueError(
            f"signature {signature.task!r}: compares tasks by {signature.likelihood!r}, but this release knows "
            f"{', '.join(COMPARISONS)}; update trace_dist, or mend the part {signature.kind!r}"
        )
    return COMPARISONS[signature.likelihood]()


class Retriever:
    """Maps representations to task indices, in the order in which the tasks' signatures were added.

    Args:
        signatures: of distinct tasks, one hidden size and one likelihood.

    Raises:
        ValueError: a task twice, another hidden size, or another likelihood.
    """

    def __init__(self, signatures: Iterable[Signature] = ()) -> None:
        self._signatures: list[Signature] = []
        self._comparison: Comparison | None = None  # not None iff there is a signature
        self._rejections: dict[tuple[int, float], Rejection] = {}
        for signature in signatures:
            self.add(signature)

    def add(self, signature: Signature) -> None:
        """Append a task; nothing of earlier tasks is fitted again.

        Raises:
            ValueError: the task is known already, its hidden size differs, or its likelihood cannot be compared.
        """
        if signature.task in self.tasks:
            raise ValueError(
                f"signature {signature.task!r}: the task is in the bank already; remove the older one first"
            )
        if self._signatures:
            first = self._signatures[0]
            if signature.dim != first.dim:
                raise ValueError(
                    f"signature {signature.task!r}: hidden size {signature.dim}, must be {first.dim} "
                    "as in the bank; fit it on the same base model"
                )
            check_comparable(signature, first)
        if self._comparison is None:
            self._comparison = _comparison(signature)
        self._comparison.add(signature)
        self._signatures.append(signature)

    @property
    def signatures(self) -> tuple[Signature, ...]:
        """The signatures, in order."""
        return tuple(self._signatures)

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in order."""
        return [signature.task for signature in self._signatures]

    @property
    def comparison(self) -> Comparison:
        """How tasks are compared.

        Raises:
            ValueError: the retriever is empty.
        """
        if self._comparison is None:
            raise ValueError("retriever: holds no signature, must hold at least one; add a task first")
        return self._comparison

    @property
    def shares_covariance(self) -> bool:
        """Whether tasks are compared by one covariance. Raises ValueError where the retriever is empty."""
        return isinstance(self.comparison, Shared)

    @property
    def shared(self) -> Shared:
        """The comparison by one covariance.

        Raises:
            ValueError: the retriever is empty, or its tasks have densities of their own.
        """
        if not isinstance(self.comparison, Shared):
            kind = self._signatures[0].kind
            raise ValueError(f"bank.signature={kind!r}: tasks share no covariance; use for example kmeans")
        return self.comparison

    @property
    def gaussian(self) -> SharedGaussian:
        """The shared covariance. Raises ValueError as ``shared`` does."""
        return self.shared.gaussian

    def whitened_means(self) -> list[Tensor]:
        """Per task, [K, D] float64 cluster means in whitened coordinates. Raises ValueError as ``shared`` does."""
        return self.shared.whitened_means()

    def log_priors(self) -> list[Tensor]:
        """Per task, [K] float64 log(w_k / T). Raises ValueError as ``shared`` does."""
        return self.shared.log_priors()

    def scores(self, x: Tensor) -> Tensor:
        """Log posterior of each task (under a shared covariance that of its best cluster), up to a constant per row.

        Args:
            x: [N, D] representations, made like those of the signatures.

        Returns:
            [N, T] float64, nats.

        Raises:
            ValueError: no signature, wrong shape, or a value that is not finite.
        """
        comparison, dim = self.comparison, self._signatures[0].dim
        if x.ndim != 2 or x.shape[1] != dim or not x.isfinite().all():
            raise ValueError(
                f"representations: shape {tuple(x.shape)}, must be finite and [N, {dim}]; use the bank's base"
            )
        return comparison.scores(x.detach().cpu())

    def rejects(self, x: Tensor, tasks: Tensor, rate: float) -> Tensor:
        """Which prompts are atypical of the task that they retrieve: [N] bool; arguments and errors as of ``excess``."""
        return self.excess(x, tasks, rate) < 0

    def excess(self, x: Tensor, tasks: Tensor, rate: float) -> Tensor:
        """How much more typical prompts are of the task that they retrieve than its threshold (``rejection``).

        Args:
            x: [N, D] representations.
            tasks: [N] index of the task that each retrieves.
            rate: share of a task's own prompts that may be rejected, in (0, 1).

        Returns:
            [N] float64, nats; inf where a task has no threshold.

        Raises:
            ValueError: as ``scores``, or the rate is out of range.
        """
        excess = torch.empty(len(x), dtype=torch.float64)
        for task in tasks.unique().tolist():
            if (task, rate) not in self._rejections:
                self._rejections[task, rate] = Rejection(self._signatures[task], rate)
            rows = tasks == task
            excess[rows] = self._rejections[task, rate].excess(x[rows])
        return excess

    def retrieve(self, x: Tensor, reject: float | None = None) -> list[str]:
        """Name of the task of each row of x [N, D]; ``base`` for those that are rejected at a rate (``rejects``)."""
        found = self.predict(x)
        names = [self.tasks[index] for index in found.tolist()]
        if reject is None:
            return names
        out = self.rejects(x, found, reject).tolist()
        return [BASE if rejected else name for name, rejected in zip(names, out, strict=True)]

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

    def lead(self, x: Tensor, task: str) -> Tensor:
        """[N] float64 nats from the best other task to ``task``: below 0 where a prompt misses it, inf where it is alone."""
        scores, index = self.scores(x), self.tasks.index(task)
        own = scores[:, index].clone()
        scores[:, index] = -torch.inf
        return own - scores.max(dim=1).values

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
