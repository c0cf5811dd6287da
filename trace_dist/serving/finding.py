"""Whose prompt is it? By the base's representation, or by each task's own where the bank's tasks were learned so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from trace_dist.bank.adapted import Adapted
from trace_dist.bank.bank import DeltaBank
from trace_dist.bank.blend import weights_of
from trace_dist.bank.representation import represent
from trace_dist.serving.bounds import Bounds
from trace_dist.serving.options import NO_BLEND, Source
from trace_dist.sharding.base import ShardedModel
from trace_dist.utils.names import BASE

Shares = tuple[tuple[str, float], ...]
"""Tasks and their weights."""


class Route(NamedTuple):
    """Who answers a prompt.

    Attributes:
        task: name of the task, or ``base``.
        margin: nats between the retrieved task and the second; None where the task was named, or no second one was compared.
        rejected: whether the prompt is of no task that the bank knows.
        shares: of a blend (``bank.blend``), tasks and their weights, the greatest first; empty where one task answers.
    """

    task: str
    margin: float | None = None
    rejected: bool = False
    shares: Shares = ()


class Finder:
    """Finds tasks in a bank as it is now; a bank that has changed takes a new one.

    Args:
        bank: nothing may be added to it afterwards.
        model: holds the base whenever tasks are looked for.
        source: how tasks are looked for.
        pad_id: of the tokenizer.
        activated: puts a task's delta into the model for a while.
    """

    def __init__(
        self,
        bank: DeltaBank,
        model: ShardedModel,
        source: Source,
        pad_id: int,
        activated: Callable[[str], AbstractContextManager[object]],
    ) -> None:
        self._bank, self._model, self._source, self._pad_id = bank, model, source, pad_id
        self._activated = activated
        asked = source.representation
        self._by_weights = bank.is_adapted if asked == "auto" else asked == "adapted"
        self._bounds = Bounds(bank.retriever) if bank.tasks and not self._by_weights else None
        self._adapted: Adapted | None = None

    def bound(self, task: str) -> float | None:
        """Upper 95 % limit on the share of a task's prompts that another task is retrieved for (``Bounds.of``).

        None where tasks are compared under their own weights: held-out prompts went through the base alone.
        """
        return None if self._bounds is None else self._bounds.of(task)

    def routes(self, ids: Sequence[Sequence[int]]) -> list[Route]:
        """Who answers each prompt.

        Args:
            ids: token ids of each prompt.

        Raises:
            ValueError: tasks are compared under their own weights, and one was learned without.
        """
        if not ids or not self._bank.tasks:
            return [Route(BASE)] * len(ids)
        x = self._represent(ids)
        scores = self._scores(ids, x)
        best = scores.topk(min(2, scores.shape[1]), dim=1)
        tasks = best.indices[:, 0]
        rate = self._source.reject
        rejected = (
            torch.zeros(len(x), dtype=torch.bool)
            if rate is None
            else self._rejects(x, best.values, tasks, rate)
        )
        return [
            Route(
                BASE if out else self._bank.tasks[index],
                _margin(values),
                out,
                () if out else self._shares(scores[row : row + 1]),
            )
            for row, (values, index, out) in enumerate(
                zip(best.values.tolist(), tasks.tolist(), rejected.tolist(), strict=True)
            )
        ]

    def _shares(self, scores: Tensor) -> Shares:
        """Of a prompt with scores [1, T]; none where they are not asked for, or one task has all of the weight."""
        if self._source.blend == NO_BLEND:
            return ()
        weights = weights_of(self._bank.tasks, scores)
        return tuple(weights.items()) if len(weights) > 1 else ()

    def _represent(self, ids: Sequence[Sequence[int]]) -> Tensor:
        return represent(
            self._model.module,
            ids,
            layer=self._bank.layer,
            pooling=self._bank.pooling,
            batch_size=self._source.batch_size,
            pad_id=self._pad_id,
        )

    def _scores(self, ids: Sequence[Sequence[int]], x: Tensor) -> Tensor:
        """[N, T] float64; -inf where a task was not compared."""
        if not self._by_weights:
            return self._bank.retriever.scores(x)
        if self._adapted is None:
            self._adapted = Adapted(self._bank, self._model, self._source.candidates, self._activated)
        return self._adapted.scores(x, lambda rows: self._represent([ids[row] for row in rows]))

    def _rejects(self, x: Tensor, best: Tensor, tasks: Tensor, rate: float) -> Tensor:
        if self._adapted is None:
            return self._bank.retriever.rejects(x, tasks, rate)
        return self._adapted.rejects(best[:, 0], tasks, rate)


def _margin(best: Sequence[float]) -> float | None:
    """Nats between the best task and the second."""
    if len(best) == 1 or best[1] == -torch.inf:
        return None
    return best[0] - best[1]
