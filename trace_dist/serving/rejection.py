"""Is a prompt of a task that the bank knows at all? And how often does retrieval go wrong?

[Note: rejection] A task t accepts a prompt x where score(x, t) is at least q_t; x is rejected where no task accepts it. With the
H held-out prompts of a task, which no fit has seen, and r the rate, q_t is their k-th lowest own score, k = floor(r (H + 1)). A
new prompt that is drawn like them lies below q_t with probability k / (H + 1) <= r at most, whatever the distribution (split
conformal prediction; Vovk, Gammerman, Shafer, "Algorithmic Learning in a Random World", 2005). So no task has more than the
share r of its own prompts rejected, on average over what could have been held out. Where H + 1 < 1 / r there is no such k: the
task accepts everything that is nearest to it, and this is said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trace_dist.bank.bound import clopper_pearson_upper
from trace_dist.bank.retrieval import Retriever
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)


class Assurance:
    """What the held-out prompts of a bank say of its retrieval, as the bank is now; read as it is asked for.

    Args:
        retriever: the bank's; nothing may be added to it afterwards.
        reject: the rate of the rejection; None rejects nothing.
    """

    def __init__(self, retriever: Retriever, reject: float | None) -> None:
        self._retriever, self._reject = retriever, reject
        self._index = {task: index for index, task in enumerate(retriever.tasks)}
        self._bounds: dict[str, float] = {}
        self._thresholds: Tensor | None = None

    def bound(self, task: str) -> float | None:
        """Upper 95 % limit (Clopper-Pearson) on the share of the task's prompts that another task is retrieved for.

        None for a task without a signature.
        """
        index = self._index.get(task)
        if index is None:
            return None
        if task not in self._bounds:
            heldout = self._retriever.signatures[index].heldout
            wrong = int((self._retriever.predict(heldout) != index).sum())
            self._bounds[task] = clopper_pearson_upper(wrong, len(heldout))
        return self._bounds[task]

    def rejected(self, scores: Tensor) -> list[bool]:
        """Whether each prompt is of no known task ([Note: rejection]); scores [N, T] as the retriever gives them."""
        if self._reject is None:
            return [False] * len(scores)
        if self._thresholds is None:
            self._thresholds = self._calibrated(self._reject)
        accepted = scores >= self._thresholds
        # A task that keeps too few prompts has -inf: it accepts what is nearest to it, and nothing else.
        unsure = self._thresholds.isinf()
        nearest = torch.nn.functional.one_hot(scores.argmax(dim=1), scores.shape[1]).bool()
        return (~torch.where(unsure, nearest, accepted).any(dim=1)).tolist()

    def _calibrated(self, rate: float) -> Tensor:
        """[T] float64: q_t; -inf where too few prompts were held out."""
        signatures = self._retriever.signatures
        own = [
            self._retriever.scores(signature.heldout)[:, index] for index, signature in enumerate(signatures)
        ]
        few = [s.task for s, scores in zip(signatures, own, strict=True) if _rank(rate, len(scores)) == 0]
        if few:
            _say_few(rate, few)
        return torch.stack([_threshold(scores, rate) for scores in own])


def _rank(rate: float, num: int) -> int:
    """k; the small term makes up for a product that comes out below a whole number, as 0.01 * 100 may."""
    return math.floor(rate * (num + 1) + 1e-9)


def _threshold(own: Tensor, rate: float) -> Tensor:
    rank = _rank(rate, len(own))
    return own.kthvalue(rank).values if rank else own.new_tensor(-torch.inf)


def _say_few(rate: float, tasks: Sequence[str]) -> None:
    shown = ", ".join(tasks[:3]) + (f" and {len(tasks) - 3} more" if len(tasks) > 3 else "")
    logger.warning(
        "reject=%s: needs %d held-out prompts of a task; %s kept fewer, and what is nearest to them is never rejected "
        "(raise bank.num_prompts when such a task is learned, or raise the rate)",
        rate, math.ceil(1 / rate - 1e-9) - 1, shown,
    )  # fmt: skip
