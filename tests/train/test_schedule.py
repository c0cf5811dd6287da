"""The schedules that are written down here are those of transformers, to the last bit."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from trace_dist.config import TrainConfig
from trace_dist.train.schedule import DECAYS, continue_schedule, make_schedule

STEPS = 23


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1)], lr=0.3)


@pytest.mark.parametrize("warmup", [0, 1, 5, 40])
@pytest.mark.parametrize("name", DECAYS)
def test_rates_are_those_of_transformers(name: str, warmup: int) -> None:
    """At every step and beyond the last; a warm-up takes at most half of the steps."""
    cfg = TrainConfig(scheduler=name, warmup_steps=warmup, min_lr_ratio=0.07)
    options = {"min_lr_rate": 0.07} if "min_lr" in name else {}
    ours, theirs = (
        make_schedule(optimizer(), cfg, STEPS),
        get_scheduler(name, optimizer(), min(warmup, STEPS // 2), STEPS, options),
    )
    for _ in range(STEPS + 3):
        assert ours.get_last_lr() == theirs.get_last_lr()
        for schedule in (ours, theirs):
            schedule.optimizer.step()
            schedule.step()


@pytest.mark.parametrize("name", ["cosine_with_min_lr", "linear"])
def test_a_schedule_goes_on_where_another_stopped(name: str) -> None:
    """``linear`` is left to transformers."""
    cfg = TrainConfig(scheduler=name, warmup_steps=3)
    whole, rest = make_schedule(optimizer(), cfg, STEPS), make_schedule(optimizer(), cfg, STEPS)
    for _ in range(7):
        whole.optimizer.step()
        whole.step()
    continue_schedule(rest, 7)
    for _ in range(3):
        assert rest.get_last_lr() == whole.get_last_lr()
        assert rest.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]
        for schedule in (whole, rest):
            schedule.optimizer.step()
            schedule.step()


@pytest.mark.parametrize("name", ["cosine_with_min_lr", "linear"])
def test_the_beginning_of_a_longer_training_falls_as_that_does(name: str) -> None:
    """Its warm-up is its own: at most half of the steps that are taken."""
    short = make_schedule(optimizer(), TrainConfig(scheduler=name, warmup_steps=20), 8, horizon=STEPS)
    whole = make_schedule(optimizer(), TrainConfig(scheduler=name, warmup_steps=4), STEPS)
    for _ in range(8):
        assert short.get_last_lr() == whole.get_last_lr()
        for schedule in (short, whole):
            schedule.optimizer.step()
            schedule.step()
