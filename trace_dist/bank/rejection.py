"""Which prompts belong to no task of the bank? Those that are less typical of the task they retrieve than its own are.

Atypical is a low log density under the task's own signature (``density``). With H held-out prompts of the task, whose
densities no fit has seen, a new prompt of the task is equally likely to take each of the H + 1 ranks among them. So

    threshold = the k-th smallest held-out density,  k = floor(rate (H + 1)),     P(rejected | task) <= k / (H + 1) <= rate

without any assumption on the distribution (split conformal prediction; Vovk, Gammerman, Shafer, "Algorithmic Learning
in a Random World", 2005). The probability is over held-out and new prompts together: for one bank the rate itself varies
like Beta(k, H + 1 - k).
"""

from __future__ import annotations

from math import ceil, floor, inf

import torch
from torch import Tensor

from trace_dist.bank.density import Mixture
from trace_dist.bank.signature import Signature
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)


def check_rate(rate: float, name: str = "bank.reject") -> None:
    """Raise ValueError unless a rate lies in (0, 1)."""
    if not 0 < rate < 1:
        raise ValueError(f"{name}={rate}: must lie in (0, 1); use for example 0.05")


def threshold(signature: Signature, rate: float) -> float:
    """The log density below which a prompt is rejected.

    Args:
        signature: of the task.
        rate: of the task's own prompts that may be rejected, in (0, 1).

    Returns:
        Nats; -inf (nothing is rejected) where 1 / rate - 1 is more than the held-out prompts, which cannot show so low a rate, or
        where the task's prompts are all the same, so that nothing says how far another one may lie.

    Raises:
        ValueError: the rate is out of range.
    """
    return Rejection(signature, rate).threshold


class Rejection:
    """Tells prompts of a task from others.

    Args:
        signature: of the task.
        rate: as ``threshold``.

    Attributes:
        threshold: as ``threshold``.
    """

    def __init__(self, signature: Signature, rate: float) -> None:
        check_rate(rate)
        self.threshold = -inf
        if not signature.has_spread:
            logger.warning(
                "reject=%s: the prompts of %s are all the same, so nothing that retrieves it is rejected; give it different ones",
                rate, signature.task,
            )  # fmt: skip
            return
        self._density = Mixture.of(signature)
        # a rate that was written as a decimal must not lose a rank to rounding
        rank = floor(rate * (len(signature.heldout) + 1) + 1e-9)
        if rank:
            self.threshold = self._density.log_density(signature.heldout).sort().values[rank - 1].item()
        else:
            logger.warning(
                "reject=%s: needs %d held-out prompts of a task, and %s kept %d, so its prompts are never rejected; raise "
                "bank.num_prompts when such a task is learned, or raise the rate",
                rate, ceil(1 / rate - 1e-9) - 1, signature.task, len(signature.heldout),
            )  # fmt: skip

    def rejects(self, x: Tensor) -> Tensor:
        """[N] bool for representations x [N, D]."""
        return self.excess(x) < 0

    def excess(self, x: Tensor) -> Tensor:
        """[N] float64 nats by which the log densities of representations x [N, D] exceed the threshold."""
        if self.threshold == -inf:
            return torch.full((len(x),), inf, dtype=torch.float64)
        return self._density.log_density(x.detach().cpu()) - self.threshold
