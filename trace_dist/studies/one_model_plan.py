"""What the study one-model compares, and how often; the section ``study`` beside a run's configuration."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import factorial
from typing import TYPE_CHECKING, ClassVar

from trace_dist.config.checks import Section, check
from trace_dist.config.task import TaskConfig

if TYPE_CHECKING:
    from trace_dist.config import RunConfig


@dataclass(frozen=True)
class OneModelConfig(Section):
    """What is compared, and how often."""

    section: ClassVar[str] = "study"

    local_tasks: list[TaskConfig] = field(default_factory=list)
    """Tasks of data that nothing installs; those whose path is not there are left out."""
    orders: int = 2
    """Orders of the tasks: that of the configuration, and shuffled ones."""
    seeds: int = 3
    """Seeds of each order."""
    ours: str = "consolidated"
    """The method that the others are compared with."""
    bound: str = "separate"
    """The method of which shares are taken: one model per task."""
    out: str | None = None
    """JSON file of what the study says; `<run_dir>/study.json` when not set."""

    def check(self) -> None:
        self.at_least(1, "orders", "seeds")


def check_study(cfg: RunConfig, study: OneModelConfig) -> None:
    """Raise ValueError where the study cannot be made of this run; before any work starts."""
    methods, num_tasks = cfg.continual.methods, len(cfg.tasks)
    for name in ("ours", "bound"):
        given = getattr(study, name)
        check(
            given in methods,
            f"study.{name}",
            given,
            f"is none of continual.methods={methods}",
            "add it there",
        )
    possible = factorial(min(num_tasks, 12))
    rule = f"{num_tasks} tasks have {possible} orders"
    check(study.orders <= possible, "study.orders", study.orders, rule, "lower it, or add tasks")


def orders(names: Sequence[str], count: int) -> list[list[str]]:
    """Different orders of some tasks, the given one first ([Note: runs])."""
    found, number = [list(names)], 0
    while len(found) < count:
        number += 1
        other = list(names)
        random.Random(number).shuffle(other)
        if other not in found:
            found.append(other)
    return found
