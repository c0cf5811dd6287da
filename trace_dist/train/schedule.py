"""Learning-rate schedules: names and shapes are those of transformers.

The usual ones are written down here, since the module of transformers that holds them is slow to import: it brings PEFT, that
bitsandbytes, and that torch's compiler. A command that looks at its configuration or trains a task would wait for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from trace_dist.config import TrainConfig

DECAYS: dict[str, Callable[[float, float], float]] = {
    "constant_with_warmup": lambda progress, floor: 1.0,
    "cosine": lambda progress, floor: _cosine(progress),
    "cosine_with_min_lr": lambda progress, floor: _cosine(progress) * (1 - floor) + floor,
}
"""Name -> the rate over its peak, given how much of the time after the warm-up is over, and the rate at the end over the peak."""
CURE = "use for example cosine_with_min_lr"


def _cosine(progress: float) -> float:
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def make_schedule(
    optimizer: torch.optim.Optimizer, cfg: TrainConfig, steps: int, horizon: int | None = None
) -> LambdaLR:
    """The learning-rate schedule of ``cfg``.

    Args:
        optimizer: whose rate it is.
        cfg: shape and warm-up.
        steps: that are taken; the warm-up is at most half of them.
        horizon: steps over which the rate falls, of which those are the first; ``steps`` when None.

    Raises:
        ValueError: unknown schedule, or one that looks at more than the step.
    """
    warmup = min(cfg.warmup_steps, steps // 2)
    horizon = horizon or steps
    if cfg.scheduler not in DECAYS:
        schedule = _of_transformers(optimizer, cfg, warmup, horizon)
        if not isinstance(schedule, LambdaLR):
            raise ValueError(f"train.scheduler={cfg.scheduler!r}: must depend on the step alone; {CURE}")
        return schedule
    decay = DECAYS[cfg.scheduler]

    def shape(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        return decay((step - warmup) / max(1, horizon - warmup), cfg.min_lr_ratio)

    return LambdaLR(optimizer, shape)


def _of_transformers(
    optimizer: torch.optim.Optimizer, cfg: TrainConfig, warmup: int, steps: int
) -> LRScheduler:
    from transformers import get_scheduler  # slow to import, see above

    options = {"min_lr_rate": cfg.min_lr_ratio} if "min_lr" in cfg.scheduler else {}
    try:
        return get_scheduler(
            cfg.scheduler,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=steps,
            scheduler_specific_kwargs=options,
        )
    except ValueError as error:
        raise ValueError(f"train.scheduler={cfg.scheduler!r}: {error}; {CURE}") from None


def check_schedule(cfg: TrainConfig) -> None:
    """Raise ValueError as ``make_schedule`` would."""
    make_schedule(torch.optim.SGD([torch.zeros(1)], lr=1.0), cfg, cfg.steps)


def continue_schedule(schedule: LambdaLR, step: int) -> None:
    """Put a new schedule where it is after some steps; the learning rate and the shape are those that it was made with."""
    schedule.last_epoch = step
    schedule._step_count = step + 1
    rates = [base * shape(step) for base, shape in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates
