"""Retrieval by each task's own representation of a prompt (PROTEUS, arXiv 2603.13235).

    task(x) = argmax over candidates k of   log p_k(h_k(x)),     h_k(x): the representation under base + delta_k

p_k is the density of the task's own signature, fitted to its prompts under its own weights (``density``). The candidates are
the tasks that score best under the base, so the cost of a prompt does not grow with the number of tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from trace_dist.bank.bank import DeltaBank
from trace_dist.bank.density import Mixture
from trace_dist.bank.rejection import Rejection
from trace_dist.bank.signature import Signature
from trace_dist.sharding.base import ShardedModel
from trace_dist.utils.names import BASE
from trace_dist.utils.together import on_all, on_main

Represent = Callable[[Sequence[int]], Tensor]


class Adapted:
    """Compares tasks by their densities under their own weights; each signature is read once.

    Args:
        bank: each of its tasks has a signature under its own weights; nothing is added to it afterwards.
        model: holds the base weights, before and after.
        candidates: tasks that are tried for a prompt.
        activated: puts a task's delta into the model for a while; the bank's own when not given.

    Raises:
        ValueError: a task has no such signature.
    """

    def __init__(
        self,
        bank: DeltaBank,
        model: ShardedModel,
        candidates: int,
        activated: Callable[[str], AbstractContextManager[object]] | None = None,
    ) -> None:
        bank.check_adapted()
        self.bank, self.candidates = bank, candidates
        self._activated = activated or partial(bank.activated, model)
        self._signatures: dict[str, Signature] = {}
        self._densities: dict[str, Mixture] = {}
        self._rejections: dict[tuple[str, float], float] = {}

    def scores(self, base: Tensor, represent: Represent) -> Tensor:
        """How likely each prompt is under each task's own weights. Collective.

        Args:
            base: [N, D] representations of the prompts under the base, equal on every rank.
            represent: rows -> [len(rows), D] representations of these prompts under the model as it is then; collective.

        Returns:
            [N, T] float64, nats, equal on every rank; -inf where a task was not tried.

        Raises:
            ValueError: as ``Retriever.scores``.
        """
        bank, most = self.bank, min(self.candidates, len(self.bank.tasks))
        # one rank decides what all of them run
        tried = on_main(lambda: bank.retriever.scores(base).topk(most, dim=1).indices)
        found = torch.full((len(base), len(bank.tasks)), -torch.inf, dtype=torch.float64)
        for index in tried.unique().tolist():
            rows = (tried == index).any(dim=1).nonzero()[:, 0]
            x = self._under(bank.tasks[index], base, represent, rows.tolist())
            found[rows, index] = self._density(bank.tasks[index]).log_density(x)
        return on_main(lambda: found)

    def rejects(self, best: Tensor, tasks: Tensor, rate: float) -> Tensor:
        """Which prompts are atypical of the task that they retrieve, under its weights (``rejection``).

        Args:
            best: [N] nats under the retrieved task.
            tasks: [N] index of that task.
            rate: share of a task's own prompts that may be rejected, in (0, 1).

        Returns:
            [N] bool.
        """
        least = [self._least(self.bank.tasks[index], rate) for index in tasks.tolist()]
        return best < torch.tensor(least, dtype=torch.float64)

    def _under(self, task: str, base: Tensor, represent: Represent, rows: list[int]) -> Tensor:
        """[len(rows), D] representations under a task's weights; those under the base are there."""
        if task == BASE:
            return base[rows]
        with self._activated(task):
            return represent(rows)

    def _signature(self, task: str) -> Signature:
        if task not in self._signatures:
            self._signatures[task] = on_all(lambda: self.bank.adapted(task))
        return self._signatures[task]

    def _density(self, task: str) -> Mixture:
        if task not in self._densities:
            self._densities[task] = Mixture.of(self._signature(task))
        return self._densities[task]

    def _least(self, task: str, rate: float) -> float:
        if (task, rate) not in self._rejections:
            self._rejections[task, rate] = Rejection(self._signature(task), rate).threshold
        return self._rejections[task, rate]


def retrieve_adapted(
    bank: DeltaBank,
    model: ShardedModel,
    base: Tensor,
    represent: Represent,
    *,
    candidates: int,
    reject: float | None = None,
) -> list[str]:
    """The task of each prompt. Collective.

    Args:
        bank, model, candidates: as ``Adapted``.
        base, represent: as ``Adapted.scores``.
        reject: as ``DeltaBank.retrieve``, by the density under the task's own weights.

    Returns:
        N names.

    Raises:
        ValueError: as ``Adapted``, or as ``Retriever.scores``.
    """
    adapted = Adapted(bank, model, candidates)
    best, tasks = adapted.scores(base, represent).max(dim=1)
    names = [bank.tasks[index] for index in tasks.tolist()]
    if reject is None:
        return names
    out = adapted.rejects(best, tasks, reject).tolist()
    return [BASE if rejected else name for name, rejected in zip(names, out, strict=True)]
