"""Retrieval by each task's own representation of a prompt (PROTEUS, arXiv 2603.13235).

    task(x) = argmax over candidates k of   log p_k(h_k(x)),     h_k(x): the representation under base + delta_k

p_k is the density of the task's own signature, fitted to its prompts under its own weights (``density``). The candidates are
the tasks that score best under the base, so the cost of a prompt does not grow with the number of tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trace_dist.bank.bank import DeltaBank
from trace_dist.bank.density import Mixture
from trace_dist.bank.rejection import Rejection
from trace_dist.sharding.base import ShardedModel
from trace_dist.utils.names import BASE
from trace_dist.utils.together import on_all, on_main

Represent = Callable[[Sequence[int]], Tensor]


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
        bank: each of its tasks has a signature under its own weights.
        model: holds the base weights, before and after.
        base: [N, D] representations of the prompts under the base, equal on every rank.
        represent: rows -> [len(rows), D] representations of these prompts under the model as it is then; collective.
        candidates: tasks that are tried for a prompt.
        reject: as ``DeltaBank.retrieve``, by the density under the task's own weights.

    Returns:
        N names.

    Raises:
        ValueError: a task has no such signature, or as ``Retriever.scores``.
    """
    bank.check_adapted()
    # one rank decides what all of them run
    tried = on_main(lambda: bank.retriever.scores(base).topk(min(candidates, len(bank.tasks)), dim=1).indices)
    best = torch.full((len(base),), -torch.inf, dtype=torch.float64)
    found = [BASE] * len(base)
    for index in tried.unique().tolist():
        name = bank.tasks[index]
        rows = (tried == index).any(dim=1).nonzero()[:, 0].tolist()
        signature = on_all(lambda name=name: bank.adapted(name))  # type: ignore[misc]
        density = Mixture.of(signature).log_density(_under(bank, model, name, base, represent, rows))
        least = -torch.inf if reject is None else Rejection(signature, reject).threshold
        for row, value in zip(rows, density, strict=True):
            if value > best[row]:
                best[row], found[row] = value, name if value >= least else BASE
    return on_main(lambda: found)


def _under(
    bank: DeltaBank, model: ShardedModel, task: str, base: Tensor, represent: Represent, rows: list[int]
) -> Tensor:
    """[len(rows), D] representations under a task's weights; those under the base are there."""
    if task == BASE:
        return base[rows]
    with bank.activated(model, task):
        return represent(rows)
