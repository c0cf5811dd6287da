"""The training loop: steps of micro-batches, a schedule, logs, checkpoints.

The loss of a step is the mean over the answer tokens of the *global* batch: every micro-batch contributes its sum divided by the
global count, and gradients are summed over micro-batches and ranks. So the curve does not depend on the number of ranks
or on the micro-batch size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from trace_dist.config import TrainConfig
from trace_dist.data.batches import Batches
from trace_dist.train.learner import Learner
from trace_dist.utils import dist
from trace_dist.utils.files import append_jsonl
from trace_dist.utils.log import get_logger, progress

logger = get_logger(__name__)


@dataclass
class TrainResult:
    """What a training run measured.

    Attributes:
        losses: (step, mean nats per answer token over the global batch) of every step.
        step_ms: median wall time of a step.
        seconds: wall time of the whole loop.
        grad_norms: global gradient norm before clipping, of every step.
    """

    losses: list[tuple[int, float]] = field(default_factory=list)
    step_ms: float = 0.0
    seconds: float = 0.0
    grad_norms: list[float] = field(default_factory=list)


class MetricLog:
    """Appends to metrics.jsonl and to TensorBoard files, on rank 0."""

    def __init__(self, folder: Path, tag: str) -> None:
        self.folder, self.tag = folder, tag
        self._writer: Any = None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record scalars at a step."""
        if not dist.is_main():
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder / "tensorboard" / self.tag))
        append_jsonl(self.folder / "metrics.jsonl", {"tag": self.tag, "step": step, **values})
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def make_schedule(optimizer: torch.optim.Optimizer, cfg: TrainConfig, steps: int) -> LRScheduler:
    """The learning-rate schedule of ``cfg``.

    Raises:
        ValueError: unknown schedule.
    """
    options = {"min_lr_rate": cfg.min_lr_ratio} if "min_lr" in cfg.scheduler else {}
    try:
        return get_scheduler(
            cfg.scheduler,
            optimizer,
            num_warmup_steps=min(cfg.warmup_steps, steps // 2),
            num_training_steps=steps,
            scheduler_specific_kwargs=options,
        )
    except ValueError as error:
        raise ValueError(
            f"train.scheduler={cfg.scheduler!r}: {error}; use for example cosine_with_min_lr"
        ) from None


def train_steps(
    learner: Learner,
    batches: Batches,
    cfg: TrainConfig,
    steps: int,
    *,
    description: str = "train",
    log: MetricLog | None = None,
    schedule: LRScheduler | None = None,
    first_step: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> TrainResult:
    """Train from ``first_step`` to ``steps``.

    Args:
        learner: what to train.
        batches: global batches, already at the right position when resuming.
        cfg: loop options.
        steps: total optimizer steps of the schedule.
        description: label of the progress bar and of log lines.
        log: where scalars go.
        schedule: the learning-rate schedule; made from ``cfg`` when None.
        first_step: steps already done.
        on_step: called after every step with the number of steps done (checkpoints).

    Raises:
        ValueError: the loss is not finite.
    """
    schedule = schedule or make_schedule(learner.optimizer, cfg, steps)
    result, times, begin = TrainResult(), [], time.perf_counter()
    learner.module.train()
    _checkpoint_activations(learner, cfg.activation_checkpointing)
    stream: Iterator[Any] = iter(batches)
    for step in progress(range(first_step + 1, steps + 1), description, total=steps - first_step):
        start = time.perf_counter()
        loss = float(dist.sum_over_ranks(learner.accumulate(next(stream))))
        if not loss < float("inf"):
            raise ValueError(f"{description}: the loss at step {step} is {loss}; lower the learning rate")
        norm = learner.step()
        rate = float(schedule.get_last_lr()[0])
        schedule.step()
        times.append(time.perf_counter() - start)
        result.losses.append((step, loss))
        result.grad_norms.append(norm)
        if log is not None and (step % cfg.log_every == 0 or step == steps):
            log.write(step, {"loss": loss, "grad_norm": norm, "lr": rate, "step_ms": 1e3 * times[-1]})
        if on_step is not None:
            on_step(step)
    result.seconds = time.perf_counter() - begin
    result.step_ms = 1e3 * median(times) if times else 0.0
    if result.losses:
        logger.info(
            "%s: %d steps, loss %.4f, %.0f ms a step",
            description,
            steps,
            result.losses[-1][1],
            result.step_ms,
        )
    return result


def _checkpoint_activations(learner: Learner, enabled: bool) -> None:
    module: Any = learner.module
    if enabled:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif getattr(module, "is_activation_checkpointing", False):
        module.gradient_checkpointing_disable()
