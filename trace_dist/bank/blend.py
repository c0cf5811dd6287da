"""One set of weights for a prompt or a batch: the bank's deltas, composed by how likely their tasks are.

    W(batch) = base + compose of  w_k (delta_k - base),      w_k = mean over the batch of P(k | x)

P(k | x) is the softmax of the retriever's scores, which are log posteriors up to a constant of x. Hard retrieval takes one delta
for each prompt; this takes one set of weights for all. Where one task is certain the two are the same, bit for bit. How changes
become one is a part of ``bank.composition``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trace_dist.bank.bank import BASE, DeltaBank
from trace_dist.bank.composition import compose
from trace_dist.bank.delta import Delta, extract_delta
from trace_dist.bank.recipe import change_of, mixed
from trace_dist.config.checks import check
from trace_dist.sharding.base import ShardedModel
from trace_dist.utils.together import on_main

NAME = "blend"


def task_weights(
    bank: DeltaBank, representations: Tensor, *, most: int = 3, least: float = 0.05
) -> dict[str, float]:
    """How much of each task a batch of prompts asks for. Collective.

    Args:
        bank: the bank.
        representations: [N, D], as ``DeltaBank.retrieve`` takes them.
        most: tasks that take part.
        least: probability below which a task takes no part, in [0, 1).

    Returns:
        Task, or ``base`` -> its weight, the greatest first; they sum to 1.

    Raises:
        ValueError: as ``DeltaBank.retrieve``, or an argument is out of range.
    """
    # one rank decides what all of them compose
    return on_main(
        lambda: weights_of(bank.tasks, bank.retriever.scores(representations), most=most, least=least)
    )


def weights_of(
    tasks: Sequence[str], scores: Tensor, *, most: int = 3, least: float = 0.05
) -> dict[str, float]:
    """``task_weights``, of prompts that were compared already.

    Args:
        tasks: T names.
        scores: [N, T] log posteriors up to a constant of each prompt; -inf where a task was not compared.
        most, least: as ``task_weights``.

    Raises:
        ValueError: an argument is out of range.
    """
    check(most >= 1, "most", most, "must be at least 1", "use for example 3")
    check(0 <= least < 1, "least", least, "must lie in [0, 1)", "use for example 0.05")
    mean = torch.softmax(scores, dim=1).mean(dim=0)
    order = mean.argsort(descending=True, stable=True)[:most].tolist()
    # What was not compared, or is beyond any doubt another task's, takes no part at a least of 0 either.
    kept = [i for place, i in enumerate(order) if place == 0 or (mean[i] >= least and mean[i] > 0)]
    total = float(mean[kept].sum())
    return {tasks[index]: float(mean[index]) / total for index in kept}


def blended(
    bank: DeltaBank,
    model: ShardedModel,
    representations: Tensor,
    *,
    kind: str = "sum",
    options: Mapping[str, Any] | None = None,
    most: int = 3,
    least: float = 0.05,
) -> Delta | None:
    """The delta of a batch of prompts; None where that is the base model. Collective.

    Args:
        bank, representations, most, least: as ``task_weights``.
        model: holds the base's values.
        kind: how changes become one: a part of ``bank.composition``, or the path of a module.
        options: its options.

    Raises:
        ValueError: as ``task_weights``, ``DeltaBank.delta_on`` and ``compose``.
    """
    return weighed(bank, model, task_weights(bank, representations, most=most, least=least), kind, options)


def weighed(
    bank: DeltaBank,
    model: ShardedModel,
    weights: Mapping[str, float],
    kind: str = "sum",
    options: Mapping[str, Any] | None = None,
) -> Delta | None:
    """The delta of some tasks with their weights; None where that is the base model. Collective.

    Args:
        weights: as ``task_weights`` gives them.
        bank, model, kind, options: as ``blended``, with its errors.
    """
    deltas = []
    for task, weight in weights.items():
        delta = None if task == BASE else bank.delta_on(task, model)
        if delta is not None:
            deltas.append(scaled(delta, model, weight))
    if not deltas:
        return None
    return deltas[0] if len(weights) == 1 else compose(deltas, model, NAME, kind, options)


def scaled(delta: Delta, base: ShardedModel, share: float) -> Delta:
    """Base plus a share of a delta's change; all of it leaves every bit. Collective."""
    if share == 1:
        return delta
    own = extract_delta(base, delta.mask, delta.task).values
    values = {}
    for name, tuned in delta.values.items():
        every = torch.arange(len(tuned))
        values[name] = mixed(own[name], [(every, change_of(tuned, own[name]), share)])
    return replace(delta, values=values)
