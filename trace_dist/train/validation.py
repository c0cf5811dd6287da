"""Looks at validation examples while a task is trained: their loss, the task's own score, the best look, and when to stop.

[Note: looks] After every ``eval_every`` steps, and after the last one, the validation examples are read as one global batch.
Their loss is the mean over their answer tokens, whatever the number of ranks. The best look has the least loss, or the highest
score; of equals the first. What the training has then is kept in host memory and in its checkpoints, and is put back at the end.
``patience`` looks without a better one end the training. All of it follows from the looks so far, which are equal on every rank
and lie in the checkpoints, so a training that was cut stops at the same step with the same values. The learning-rate schedule is
that of all steps: a training that is stopped early has not come to the schedule's end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from trace_dist.config import TrainConfig
from trace_dist.data.batches import Step
from trace_dist.evaluation.passes import evaluating
from trace_dist.train.learner import Learner
from trace_dist.train.loss import accumulate
from trace_dist.utils import dist
from trace_dist.utils.finite import check_finite
from trace_dist.utils.rng import random_numbers_kept


class Look(NamedTuple):
    """What one look found: after which step, nats per answer token, and the score in percent where it is measured."""

    step: int
    loss: float
    score: float | None = None


@dataclass(frozen=True)
class Validation:
    """What a training looks at.

    Attributes:
        examples: this rank's part of all validation examples, as one global batch.
        score: the score of the model as it is, in percent; None where the metric is not measured. Collective.
    """

    examples: Step
    score: Callable[[], float] | None = None


def answer_loss(learner: Learner, examples: Step) -> float:
    """Nats per answer token of a global batch, under the model as it is; the same on every rank. Collective."""
    with evaluating(learner.module):
        mine = accumulate(examples, learner.forward, lambda loss: None, learner.device)
    return float(dist.broadcast_object(float(dist.sum_over_ranks(mine))))


def best_of(looks: Sequence[Look]) -> Look:
    """The best look ([Note: looks]): by the score where there is one."""
    return min(looks, key=lambda look: (0.0 if look.score is None else -look.score, look.loss))


class Validator:
    """Takes the looks of one training.

    Args:
        validation: what it looks at.
        cfg: how often, what is best, what is kept.
        steps: of the whole training.
    """

    def __init__(self, validation: Validation, cfg: TrainConfig, steps: int) -> None:
        self._validation, self._cfg, self._steps = validation, cfg, steps

    def due(self, step: int) -> bool:
        """Whether a look should follow this step."""
        return step % self._cfg.eval_every == 0 or step == self._steps

    def look(self, learner: Learner, step: int, before: Sequence[Look]) -> Look:
        """Look at the examples; where it is the best so far, the learner keeps its values. Collective.

        Args:
            learner: what is trained.
            step: steps done.
            before: earlier looks.

        Raises:
            NotFinite: the loss is not; on all ranks.
        """
        with random_numbers_kept(), evaluating(learner.module):
            loss = answer_loss(learner, self._validation.examples)
            check_finite(loss, "the validation loss")
            score = None if self._validation.score is None else self._validation.score()
        look = Look(step, loss, score)
        if self._cfg.keep == "best" and best_of([*before, look]) is look:
            learner.keep_best()
        return look

    def is_over(self, looks: Sequence[Look]) -> bool:
        """Whether patience is at its end after these looks."""
        if self._cfg.patience is None or not looks:
            return False
        return len(looks) - 1 - list(looks).index(best_of(looks)) >= self._cfg.patience

    def leave(self, learner: Learner, looks: Sequence[Look]) -> int:
        """Make the learner hold the values that are kept; their step. Collective.

        Args:
            learner: which holds those of the last look.
            looks: at least one.
        """
        kept = best_of(looks) if self._cfg.keep == "best" else looks[-1]
        if kept is not looks[-1]:
            learner.put_best()
        return kept.step

    def check_kept(self, looks: Sequence[Look], kept: int | None) -> None:
        """Raise ValueError where a checkpoint has not the values of the best of its looks.

        Args:
            looks: those that it tells of.
            kept: the step whose values it has beside those of its own step.
        """
        if self._cfg.keep == "best" and looks and kept != best_of(looks).step:
            raise ValueError(
                f"train.keep='best': the checkpoint has not kept the values of step {best_of(looks).step}, its best look by "
                f"{self._cfg.eval_by}; set train.keep and train.eval_by back, or delete the checkpoints to start anew"
            )
