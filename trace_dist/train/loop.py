"""The training loop: steps of micro-batches, a schedule, logs, checkpoints.

The loss of a step is the mean over the answer tokens of the *global* batch: every micro-batch contributes its sum divided by the
global count, and gradients are summed over micro-batches and ranks. So the curve does not depend on the number of ranks
or on the micro-batch size.

A step whose loss or gradient is infinite or NaN is skipped, on all ranks alike (``train.bad_steps``); a learning rate that is
stops all ranks. Weights and moments are looked at before every checkpoint and after the last step, so that nothing broken is
kept.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from trace_dist.config import TrainConfig
from trace_dist.data.batches import Batches
from trace_dist.train.bad_steps import Watch, shown_rows
from trace_dist.train.learner import Learner
from trace_dist.train.metric_log import MetricLog
from trace_dist.train.packing import settle_packing
from trace_dist.train.schedule import continue_schedule, make_schedule
from trace_dist.train.sequence import settle_sequence
from trace_dist.train.validation import Look, Validator
from trace_dist.utils import dist, stopping
from trace_dist.utils.agreement import agree
from trace_dist.utils.finite import NotFinite, all_finite, check_finite
from trace_dist.utils.log import get_logger, progress
from trace_dist.utils.stopping import Stopped

logger = get_logger(__name__)


@dataclass
class TrainResult:
    """What a training run measured, pauses between its parts left out.

    Attributes:
        losses: (step, mean nats per answer token over the global batch) of every step that was taken.
        grad_norms: global gradient norm before clipping, of each of them.
        durations: wall time of each of them, seconds.
        seconds: wall time of the whole loop.
        looks: at the validation examples; none where there are no such.
        kept_step: the step whose values a training with looks left; None before it ended, and without looks.
        skipped: the steps that were not taken, as their loss or gradient was infinite or NaN.
        rollbacks: (step at which the loss jumped, step of the checkpoint that the training went back to).
    """

    losses: list[tuple[int, float]] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    durations: list[float] = field(default_factory=list)
    seconds: float = 0.0
    looks: list[Look] = field(default_factory=list)
    kept_step: int | None = None
    skipped: list[int] = field(default_factory=list)
    rollbacks: list[tuple[int, int]] = field(default_factory=list)

    @property
    def last_step(self) -> int | None:
        """The last step that was taken or skipped; None before the first."""
        return max([*(step for step, _ in self.losses[-1:]), *self.skipped[-1:]], default=None)

    @property
    def step_ms(self) -> float:
        """Median wall time of a step."""
        return 1e3 * median(self.durations) if self.durations else 0.0

    def add(self, step: int, loss: float, grad_norm: float, duration: float) -> None:
        """Record a step."""
        self.losses.append((step, loss))
        self.grad_norms.append(grad_norm)
        self.durations.append(duration)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; nothing of looks, skipped steps and rollbacks where there were none."""
        found = asdict(self)
        left_out = {name for name in ("looks", "skipped", "rollbacks") if not found[name]}
        left_out |= set() if self.looks else {"kept_step"}
        return {name: value for name, value in found.items() if name not in left_out}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> TrainResult:
        """What ``to_json`` gave, after a way through JSON."""
        kept = stored.get("kept_step")
        return cls(
            [(int(step), float(loss)) for step, loss in stored["losses"]],
            [float(norm) for norm in stored["grad_norms"]],
            [float(duration) for duration in stored["durations"]],
            float(stored["seconds"]),
            [
                Look(int(step), float(loss), None if score is None else float(score))
                for step, loss, score in stored.get("looks", [])
            ],
            None if kept is None else int(kept),
            [int(step) for step in stored.get("skipped", [])],
            [(int(step), int(back)) for step, back in stored.get("rollbacks", [])],
        )


class Keeper(Protocol):
    """Writes checkpoints."""

    def attend(self) -> None:
        """See to one that is being written beside training, before every step; raises what went wrong with it. Collective."""

    def due(self, step: int) -> bool:
        """Whether one should follow this step. Rank 0's word counts."""

    def keep(self, step: int, result: TrainResult) -> None:
        """Write one after this many steps. Collective."""

    def go_back(self) -> tuple[int, TrainResult]:
        """Let the learner hold the newest one; its step, and what was measured up to there. Data go on. Collective."""


def train_steps(
    learner: Learner,
    batches: Batches,
    cfg: TrainConfig,
    steps: int,
    *,
    description: str = "train",
    rate: str = "train.lr",
    cure: str | None = None,
    log: MetricLog | None = None,
    schedule: LambdaLR | None = None,
    first_step: int = 0,
    result: TrainResult | None = None,
    keeper: Keeper | None = None,
    validator: Validator | None = None,
) -> TrainResult:
    """Train from ``first_step`` to ``steps``, or until looks at validation examples say that it is enough.

    Args:
        learner: what to train.
        batches: global batches, already at the right position when resuming.
        cfg: loop options.
        steps: total optimizer steps of the schedule.
        description: label of the progress bar and of log lines; names the task.
        rate: the field that sets the learning rate, for messages.
        cure: what helps where training diverges; None: a lower rate, and the same command.
        log: where scalars go.
        schedule: the learning-rate schedule; made from ``cfg`` when None.
        first_step: steps already done.
        result: what those steps measured; it is continued.
        keeper: writes checkpoints.
        validator: takes the looks; the learner then holds the values that are to be kept.

    Raises:
        ValueError: the ranks were given different options.
        NotFinite: a learning rate or an update is not finite, too many steps in a row were bad, or the loss has jumped too often.
            On all ranks.
        Stopped: the command was asked to stop; a checkpoint follows the last step, where there is a keeper. On all ranks.
    """
    options = {f"train.{name}": value for name, value in asdict(cfg).items()}
    agree(options | {rate: learner.optimizer.defaults["lr"], "steps": steps, "first step": first_step})
    schedule = schedule or make_schedule(learner.optimizer, cfg, steps)
    result = result or TrainResult()
    begin = time.perf_counter() - result.seconds
    what = f"{rate}={float(schedule.base_lrs[0]):g}: {description}"
    diagnose = partial(_diagnosis, what, cure or cure_of(rate), steps, batches)
    learner.module.train()
    _checkpoint_activations(learner, cfg.activation_checkpointing)
    settle_packing(learner, batches)
    settle_sequence(learner, batches)
    stream: Iterator[Any] = iter(batches)
    watch = Watch(cfg, description, learner, batches, log)
    ended = validator is not None and validator.is_over(result.looks)
    todo = _Steps(steps if ended else first_step, steps)
    resumed, owed = todo.done, False
    if keeper is not None and cfg.spike_factor is not None and first_step == 0:
        keeper.keep(0, result)
    for step in progress(todo, description, total=steps, begun=resumed):
        start = time.perf_counter()
        if keeper is not None:
            keeper.attend()
        with diagnose(step):
            due = keeper is not None and (owed or keeper.due(step))
            mine = learner.accumulate(next(stream))
            loss, due, stop = _reduce(mine, due, stopping.asked() and step < steps)
            lr = _step_rate(learner)
            if keeper is not None and watch.jumps(loss, result.losses):
                result = _go_back(keeper, watch, step, loss, result)
                todo.done = result.rollbacks[-1][1]
                continue_schedule(schedule, todo.done)
                continue
            norm = _take_step(watch, step, loss, mine, result)
        # Weights that give no finite gradient are nothing to go on from.
        owed, due = due and norm is None, due and norm is not None
        schedule.step()
        now = time.perf_counter()
        result.seconds = now - begin
        if norm is not None:
            result.add(step, loss, norm, now - start)
            if log is not None and (step % cfg.log_every == 0 or step == steps):
                log.write(step, {"loss": loss, "grad_norm": norm, "lr": lr, "step_ms": 1e3 * (now - start)})
        ended = step == steps
        if validator is not None and validator.due(step):
            with diagnose(step):
                result.looks.append(validator.look(learner, step, result.looks))
            result.seconds = time.perf_counter() - begin
            _say_look(description, result.looks, log)
            ended = ended or validator.is_over(result.looks)
        if due or stop or ended:
            with diagnose(step):
                _check_update(learner)
        if keeper is not None and (due or stop):
            keeper.keep(step, result)
        if ended:
            break
        if stop:
            kept = "kept" if keeper is not None else "not kept, as this part keeps no checkpoints"
            raise Stopped(f"{description}: step {step} of {steps} is done and {kept}")
    _say_end(description, result)
    if validator is not None and result.looks:
        result.kept_step = validator.leave(learner, result.looks)
        _say_kept(description, result, steps)
    return result


def cure_of(rate: str) -> str:
    """What helps where training diverges.

    Args:
        rate: the field that sets the learning rate.
    """
    return f"lower {rate} and start the same command again"


class _Steps:
    """The steps after ``done`` up to the last one; ``done`` may be set back."""

    def __init__(self, done: int, last: int) -> None:
        self.done, self._last = done, last

    def __iter__(self) -> Iterator[int]:
        while self.done < self._last:
            self.done += 1
            yield self.done


def _take_step(watch: Watch, step: int, loss: float, mine: Tensor, result: TrainResult) -> float | None:
    """Update; the gradient norm, or None where the step is a bad one and was skipped. Raises NotFinite after too many."""
    try:
        check_finite(loss, "the loss")
        return watch.learner.step()
    except NotFinite as error:
        watch.skip(step, error, float(mine), result.skipped)
        return None


def _go_back(keeper: Keeper, watch: Watch, step: int, loss: float, result: TrainResult) -> TrainResult:
    """Go back from a step whose loss jumps; what was measured up to there. Raises NotFinite where it may not any more."""
    watch.check_rollback(step, loss, result.rollbacks)
    back, kept = keeper.go_back()
    kept.rollbacks = [*result.rollbacks, (step, back)]
    watch.say_rollback(step, loss, back, watch.usual(result.losses))
    return kept


def _say_end(description: str, result: TrainResult) -> None:
    if result.losses:
        _, loss = result.losses[-1]
        last, ms = result.last_step, result.step_ms
        skipped = f", {len(result.skipped)} skipped" if result.skipped else ""
        logger.info("%s: %d steps%s, loss %.4f, %.0f ms a step", description, last, skipped, loss, ms)


def _say_look(description: str, looks: list[Look], log: MetricLog | None) -> None:
    """Of the newest look."""
    step, loss, score = looks[-1]
    scored = "" if score is None else f", score {score:.1f} %"
    logger.info("%s: step %d: validation loss %.4f%s", description, step, loss, scored)
    if log is not None:
        log.write(step, {"validation_loss": loss} | ({} if score is None else {"validation_score": score}))


def _say_kept(description: str, result: TrainResult, steps: int) -> None:
    last = result.last_step or steps
    early = "" if last == steps else f", stopped early: {steps} were planned"
    logger.info("%s: kept the values of step %s of %d%s", description, result.kept_step, last, early)


def _reduce(loss: Tensor, due: bool, stop: bool) -> tuple[float, bool, bool]:
    """The global loss, and whether rank 0 wants a checkpoint, and to stop after it, in one collective."""
    wish = dist.is_main() * (2.0 if stop else float(due))
    both = torch.stack([loss, torch.full_like(loss, wish)])
    total, wanted = dist.sum_over_ranks(both).tolist()
    return total, wanted > 0, wanted > 1


def _step_rate(learner: Learner) -> float:
    """The learning rate of the coming step; raises NotFinite where a schedule gives none."""
    rates = [float(group["lr"]) for group in learner.optimizer.param_groups]
    for rate in rates:
        check_finite(rate, "the learning rate")
    return rates[0]


def _check_update(learner: Learner) -> None:
    """Raise NotFinite, on all ranks, where a weight or a moment is not finite. Collective."""
    if dist.max_over_ranks(float(not all_finite(learner.tensors()))):
        raise NotFinite("a weight or moment is infinite or NaN")


@contextmanager
def _diagnosis(what: str, cure: str, steps: int, batches: Batches, step: int) -> Iterator[None]:
    """Where something turns out not to be finite: says which step and which examples, and what helps."""
    try:
        yield
    except NotFinite as error:
        raise NotFinite(
            f"{what}: {error} at step {step} of {steps}; {cure}, or look at the training examples of this step (numbers "
            f"{shown_rows(batches)})"
        ) from None


def _checkpoint_activations(learner: Learner, enabled: bool) -> None:
    module: Any = learner.module
    if enabled:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif getattr(module, "is_activation_checkpointing", False):
        module.gradient_checkpointing_disable()
