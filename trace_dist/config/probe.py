"""Probing the proxy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trace_dist.config.checks import Section
from trace_dist.parts import SCORES


@dataclass(frozen=True)
class ProbeConfig(Section):
    """The warm-start fine-tune that exposes a task's core parameters (TRACE, arXiv 2605.31025)."""

    section: ClassVar[str] = "probe"

    steps: int = 40
    """Optimizer steps of the warm start; 0 to measure at the base, with a score that reads no update."""
    lr: float = 1e-3
    """Peak learning rate of the warm start."""
    batch_size: int = 64
    """Examples per step."""
    fisher_batches: int = 5
    """Batches over which the empirical Fisher information is averaged after the warm start."""
    score: str = "l2_fisher"
    """l2 (|update|), fisher (root of the mean squared gradient), l2_fisher (their product), first_order (|weight| times
    that root), relative_update (|update| over |weight|), snr (mean of the gradient over its deviation), or the path of a
    module of your own."""
    specificity_weight: float = 0.0
    """Exponent s >= 0: a tensor's budget is scaled by its specificity (1 - max cosine with other tasks) ** s."""

    def check(self) -> None:
        self.at_least(1, "batch_size", "fisher_batches")
        self.at_least(0, "steps", "specificity_weight")
        self.positive("lr")
        SCORES.check(self.score)
