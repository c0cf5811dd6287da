"""Probing the proxy."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar, Literal

from trace_dist.config.checks import Section, check
from trace_dist.parts import SCORES


@dataclass(frozen=True)
class ProbeConfig(Section):
    """The warm-start fine-tune that exposes a task's core parameters (TRACE, arXiv 2605.31025)."""

    section: ClassVar[str] = "probe"

    steps: int = 40
    """Optimizer steps of the warm start; 0 to measure at the base, with a score that reads no update."""
    lr: float = 1e-3
    """Peak learning rate of the warm start."""
    epochs: float | None = None
    """Passes of the warm start over the task's training examples, instead of steps."""
    batch_size: int = 64
    """Examples per step."""
    fisher_batches: int = 5
    """Batches over which the empirical Fisher information is averaged after the warm start."""
    fisher_batch_size: int | None = None
    """Examples of such a batch of the proxy's; as batch_size when not set."""
    score: str = "l2_fisher"
    """l2 (|update|), fisher (root of the mean squared gradient), l2_fisher (their product), l2_plus_fisher (both between 0 and 1
    over the model, in equal shares), specific (l2_fisher over that of the other tasks and general sets), first_order (|weight|
    times that root), relative_update (|update| over |weight|), snr (mean of the gradient over its deviation), or the path of a
    module of your own."""
    specificity_weight: float = 0.0
    """Exponent s >= 0: a tensor's budget is scaled by its specificity (1 - max cosine with other tasks) ** s."""

    margin: float = 0.1
    """A probe has learned its task where its loss on held-out examples lies this share of chance's below it; chance guesses each
    token of an answer from those that training answers have at its position, without a prompt. Not looked at with 0 steps."""
    unlearned: Literal["warn", "refuse"] = "warn"
    """What to do with a task that the proxy has not learned, of which its mask shows nothing."""

    def check(self) -> None:
        margin, rule = self.margin, "must lie in [0, 1)"
        check(0 <= margin < 1, "probe.margin", margin, rule, "use for example 0.1")
        self.at_least(1, "batch_size", "fisher_batches", "fisher_batch_size")
        self.at_least(0, "steps", "specificity_weight")
        self.positive("lr", "epochs")
        SCORES.check(self.score)

    def num_steps(self, num_examples: int) -> int:
        """Steps of the warm start on so many training examples."""
        return self.steps if self.epochs is None else ceil(self.epochs * num_examples / self.batch_size)
