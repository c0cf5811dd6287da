"""Steps that go wrong: an infinite or NaN loss or gradient, and losses that jump.

A bad step changes nothing. It is skipped: the schedule and the data go on, and the log and metrics.jsonl say which examples it
had and on which ranks it went wrong. More than ``train.max_bad_steps`` of them in a row end the training, and so does one whose
weights are not finite themselves.

A loss that jumps is finite, and often shows that the weights have gone astray some steps before. So the training goes back
to its newest checkpoint, and on from there with the examples that come next: those between are left out, as PaLM's training did
(Chowdhery et al., arXiv 2204.02311, section 5.1). What is left out follows from the checkpoint and the data alone: a training
that is cut and continued leaves out the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from statistics import median
from typing import Any

from trace_dist.config import TrainConfig
from trace_dist.data.batches import Batches
from trace_dist.train.learner import Learner
from trace_dist.train.metric_log import MetricLog
from trace_dist.utils import dist
from trace_dist.utils.finite import NotFinite, all_finite
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)
SHOWN_ROWS = 16
"""Training examples that a message names."""
WINDOW = 16
"""Losses that say what is usual."""
LEAST = 8
"""How many of them there must be."""


def shown_rows(batches: Batches) -> str:
    """The training examples of the last batch, for a message."""
    rows = batches.last_rows()
    more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
    return ", ".join(map(str, rows[:SHOWN_ROWS])) + more


@dataclass(frozen=True)
class Watch:
    """What is done where a step goes wrong.

    Attributes:
        cfg: how much of it is borne.
        description: names the training in messages.
        learner: what is trained.
        batches: where the examples come from.
        log: where it is written.
    """

    cfg: TrainConfig
    description: str
    learner: Learner
    batches: Batches
    log: MetricLog | None

    def skip(self, step: int, error: NotFinite, loss: float, skipped: list[int]) -> None:
        """Leave out a step whose loss or gradient is not finite, and say so. Collective.

        Args:
            step: which.
            error: what is wrong.
            loss: this rank's part of the loss.
            skipped: the steps that were skipped before; this one is added.

        Raises:
            NotFinite: there were too many in a row, or the weights are past help.
        """
        ranks = self._ranks(loss)
        self.learner.discard()
        row = 1 + sum(1 for _ in takewhile(set(skipped).__contains__, count(step - 1, -1)))
        where = f" on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" if len(ranks) else ""
        self._write(step, {"bad_steps": len(skipped) + 1}, {"problem": str(error), "ranks": ranks})
        if row > self.cfg.max_bad_steps:
            row_of = f", after {row - 1} bad steps before it (train.max_bad_steps)" if row > 1 else ""
            raise NotFinite(f"{error}{where}{row_of}") from None
        if dist.max_over_ranks(float(not all_finite(self.learner.tensors()))):
            raise NotFinite(
                f"{error}{where}, and so are weights or moments by now: no later step can be better"
            ) from None
        skipped.append(step)
        logger.warning(
            "%s: %s%s at step %d, which is skipped; %d bad step%s so far (train.max_bad_steps=%d in a row); training examples %s",
            *(self.description, error, where, step, len(skipped), "s" * (len(skipped) > 1)),
            *(self.cfg.max_bad_steps, shown_rows(self.batches)),
        )

    def jumps(self, loss: float, losses: Sequence[tuple[int, float]]) -> bool:
        """Whether a loss lies far above those of the steps before it; a rule of the global losses alone, alike on every rank."""
        factor = self.cfg.spike_factor
        if factor is None or len(losses) < LEAST or not math.isfinite(loss):
            return False
        return loss > factor * self.usual(losses)

    def usual(self, losses: Sequence[tuple[int, float]]) -> float:
        """The median of the last ones."""
        return median(loss for _, loss in losses[-WINDOW:])

    def check_rollback(self, step: int, loss: float, rollbacks: Sequence[tuple[int, int]]) -> None:
        """Raise NotFinite where the training has gone back as often as it may."""
        self.learner.discard()
        if len(rollbacks) >= self.cfg.spike_rollbacks:
            self._write(step, {"spike": loss}, {})
            raise NotFinite(
                f"the loss jumps to {loss:.4g} after {len(rollbacks)} returns to a checkpoint (train.spike_rollbacks)"
            )

    def say_rollback(self, step: int, loss: float, back: int, usual: float) -> None:
        """Tell of a training that has gone back from a step to an earlier one."""
        self._write(step, {"spike": loss}, {"back_to_step": back})
        logger.warning(
            "%s: the loss jumps to %.4g at step %d (the last ones were about %.4g): back to the checkpoint of step %d, and on "
            "with the examples that come next; those of steps %d to %d are left out (train.spike_factor=%g)",
            *(self.description, loss, step, usual, back, back + 1, step, self.cfg.spike_factor),
        )

    def _ranks(self, loss: float) -> list[int]:
        """The ranks whose loss or gradient is not finite. Collective."""
        by_loss = dist.gather_objects(not math.isfinite(loss))
        found = {rank for rank, is_bad in enumerate(by_loss) if is_bad} or {*self.learner.ranks_not_finite()}
        return sorted(found) if dist.world_size() > 1 else []

    def _write(self, step: int, values: dict[str, float], beside: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.write(step, values, {**beside, "examples": self.batches.last_rows()})
