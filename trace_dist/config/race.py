"""How a learning rate of `auto` is chosen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from trace_dist.config.checks import Section, check


@dataclass(frozen=True)
class RaceConfig(Section):
    """The race for a peak learning rate where `lr` is `auto`: each rate trains a method's first tasks for a few steps."""

    section: ClassVar[str] = "race"

    grid: list[float] = field(default_factory=lambda: [1e-3, 3e-3, 1e-2])
    """Rates that race; where the best one is the lowest or the highest, the next one beyond it races too, twice at most."""
    tasks: int = 2
    """First tasks that each rate trains, one after another; the mean of the losses after each counts."""
    steps: int = 40
    """Optimizer steps of each rate and task, with a schedule of their own; at most those of the task."""
    heldout: int = 200
    """Training examples that are held out to compare the rates by; at most a fifth of them. A run that validates
    (`train.eval_every`) compares by its validation examples instead. Test examples are never used."""

    def check(self) -> None:
        grid = self.grid
        rule, cure = (
            "must hold at least two rates, all positive, none twice",
            "use for example [1e-3, 3e-3, 1e-2]",
        )
        ok = len(grid) >= 2 and min(grid) > 0 and len(set(grid)) == len(grid)
        check(ok, "race.grid", grid, rule, cure)
        self.at_least(1, "tasks", "steps", "heldout")
