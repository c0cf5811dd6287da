"""The training loop: steps of micro-batches, a schedule, logs, checkpoints.

The loss of a step is the mean over the answer tokens of the *global* batch: every micro-batch contributes its sum divided by the
global count, and gradients are summed over micro-batches and ranks. So the curve does not depend on the number of ranks
or on the micro-batch size.

A loss, gradient norm or learning rate that is infinite or NaN stops all ranks in the step where it appears. Weights and moments
are looked at before every checkpoint and after the last step, so that nothing broken is kept.
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
from trace_dist.run_folder import RunFolder
from trace_dist.train.learner import Learner
from trace_dist.train.schedule import make_schedule
from trace_dist.utils import dist, stopping
from trace_dist.utils.agreement import agree
from trace_dist.utils.files import append_jsonl, writing
from trace_dist.utils.finite import NotFinite, all_finite, check_finite
from trace_dist.utils.log import get_logger, progress
from trace_dist.utils.stopping import Stopped

logger = get_logger(__name__)
SHOWN_ROWS = 16
"""Training examples that a message names."""


@dataclass
class TrainResult:
    """What a training run measured, pauses between its parts left out.

    Attributes:
        losses: (step, mean nats per answer token over the global batch) of every step.
        grad_norms: global gradient norm before clipping, of every step.
        durations: wall time of every step, seconds.
        seconds: wall time of the whole loop.
    """

    losses: list[tuple[int, float]] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    durations: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def step_ms(self) -> float:
        """Median wall time of a step."""
        return 1e3 * median(self.durations) if self.durations else 0.0

    def add(self, step: int, loss: float, grad_norm: float, duration: float) -> None:
        """Record a step."""
        self.losses.append((step, loss))
        self.grad_norms.append(grad_norm)
        self.durations.append(duration)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> TrainResult:
        """What ``asdict`` gave, after a way through JSON."""
        return cls(
            [(int(step), float(loss)) for step, loss in stored["losses"]],
            [float(norm) for norm in stored["grad_norms"]],
            [float(duration) for duration in stored["durations"]],
            float(stored["seconds"]),
        )


class Keeper(Protocol):
    """Writes checkpoints."""

    def due(self, step: int) -> bool:
        """Whether one should follow this step. Rank 0's word counts."""

    def keep(self, step: int, result: TrainResult) -> None:
        """Write one after this many steps. Collective."""


class MetricLog:
    """Appends to metrics.jsonl and to TensorBoard files, on rank 0."""

    def __init__(self, folder: RunFolder, tag: str) -> None:
        self.folder, self.tag = folder, tag
        self._writer: Any = None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record scalars at a step."""
        if not dist.is_main():
            return
        append_jsonl(self.folder.metrics, {"tag": self.tag, "step": step, **values})
        with writing(self.folder.tensorboard(self.tag)):
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self.folder.tensorboard(self.tag)))
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            with writing(self.folder.tensorboard(self.tag)):
                self._writer.close()


def train_steps(
    learner: Learner,
    batches: Batches,
    cfg: TrainConfig,
    steps: int,
    *,
    description: str = "train",
    rate: str = "train.lr",
    log: MetricLog | None = None,
    schedule: LambdaLR | None = None,
    first_step: int = 0,
    result: TrainResult | None = None,
    keeper: Keeper | None = None,
) -> TrainResult:
    """Train from ``first_step`` to ``steps``.

    Args:
        learner: what to train.
        batches: global batches, already at the right position when resuming.
        cfg: loop options.
        steps: total optimizer steps of the schedule.
        description: label of the progress bar and of log lines; names the task.
        rate: the field that sets the learning rate, for messages.
        log: where scalars go.
        schedule: the learning-rate schedule; made from ``cfg`` when None.
        first_step: steps already done.
        result: what those steps measured; it is continued.
        keeper: writes checkpoints.

    Raises:
        ValueError: the ranks were given different options.
        NotFinite: a loss, a gradient norm, a learning rate or an update is not finite. On all ranks.
        Stopped: the command was asked to stop; a checkpoint follows the last step, where there is a keeper. On all ranks.
    """
    options = {f"train.{name}": value for name, value in asdict(cfg).items()}
    agree(options | {rate: learner.optimizer.defaults["lr"], "steps": steps, "first step": first_step})
    schedule = schedule or make_schedule(learner.optimizer, cfg, steps)
    result = result or TrainResult()
    begin = time.perf_counter() - result.seconds
    diagnose = partial(_diagnosis, description, rate, float(schedule.base_lrs[0]), steps, batches)
    learner.module.train()
    _checkpoint_activations(learner, cfg.activation_checkpointing)
    stream: Iterator[Any] = iter(batches)
    for step in progress(range(first_step + 1, steps + 1), description, total=steps - first_step):
        start = time.perf_counter()
        with diagnose(step):
            due = keeper is not None and keeper.due(step)
            loss, due, stop = _reduce(
                learner.accumulate(next(stream)), due, stopping.asked() and step < steps
            )
            lr = _step_rate(learner)
            norm = learner.step()
        schedule.step()
        now = time.perf_counter()
        result.add(step, loss, norm, now - start)
        result.seconds = now - begin
        if log is not None and (step % cfg.log_every == 0 or step == steps):
            log.write(step, {"loss": loss, "grad_norm": norm, "lr": lr, "step_ms": 1e3 * (now - start)})
        if due or stop or step == steps:
            with diagnose(step):
                _check_update(learner)
        if keeper is not None and (due or stop):
            keeper.keep(step, result)
        if stop:
            kept = "kept" if keeper is not None else "not kept, as this part keeps no checkpoints"
            raise Stopped(f"{description}: step {step} of {steps} is done and {kept}")
    if result.losses:
        loss, step_ms = result.losses[-1][1], result.step_ms
        logger.info("%s: %d steps, loss %.4f, %.0f ms a step", description, steps, loss, step_ms)
    return result


def _reduce(loss: Tensor, due: bool, stop: bool) -> tuple[float, bool, bool]:
    """The global loss, and whether rank 0 wants a checkpoint, and to stop after it, in one collective.

    Raises:
        NotFinite: the loss is not.
    """
    wish = dist.is_main() * (2.0 if stop else float(due))
    both = torch.stack([loss, loss.new_tensor(wish)])
    total, wanted = dist.sum_over_ranks(both).tolist()
    check_finite(total, "the loss")
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
def _diagnosis(
    description: str, rate: str, peak: float, steps: int, batches: Batches, step: int
) -> Iterator[None]:
    """Where something turns out not to be finite: says which step and which examples, and what helps."""
    try:
        yield
    except NotFinite as error:
        rows = batches.last_rows()
        more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
        shown = ", ".join(map(str, rows[:SHOWN_ROWS])) + more
        raise NotFinite(
            f"{rate}={peak:g}: {description}: {error} at step {step} of {steps}; lower {rate} and start the same command "
            f"again, or look at the training examples of this step (numbers {shown})"
        ) from None


def _checkpoint_activations(learner: Learner, enabled: bool) -> None:
    module: Any = learner.module
    if enabled:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif getattr(module, "is_activation_checkpointing", False):
        module.gradient_checkpointing_disable()
