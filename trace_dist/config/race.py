"""How a learning rate of `auto` is chosen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from trace_dist.config.checks import Section, check


@dataclass(frozen=True)
class RaceConfig(Section):
    """The race for a peak learning rate where `lr` is `auto`, and for `mask.density: auto`: each rate (at each density) trains
    the first tasks for a few steps."""

    section: ClassVar[str] = "race"

    grid: list[float] = field(default_factory=lambda: [1e-3, 3e-3, 1e-2])
    """Rates that race; where the best one is the lowest or the highest, the next one beyond it races too, four times at
    most."""
    tasks: int = 2
    """First tasks that each rate trains, one after another; the mean of the losses after each counts."""
    steps: int = 40
    """Optimizer steps of each rate and task, the first of its whole schedule; at most those of the task."""
    heldout: int = 200
    """Training examples that are held out to compare the rates by; at most a fifth of them. A run that validates
    (`train.eval_every`) compares by its validation examples instead. Test examples are never used."""

    densities: list[float] = field(default_factory=lambda: [1.6e-3, 5e-3, 1.6e-2, 5e-2])
    """Densities that race where `mask.density` is `auto`, each with rates of its own."""
    density_margin: float = 0.05
    """Nats per answer token by which the loss at a density may lie above the best one; the smallest such density wins."""

    def check(self) -> None:
        densities = self.densities
        rule = "must hold at least two densities in (0, 1], none twice"
        ok = len(densities) >= 2 and min(densities) > 0 and max(densities) <= 1
        ok = ok and len(set(densities)) == len(densities)
        check(ok, "race.densities", densities, rule, "use for example [0.005, 0.016, 0.05]")
        self.at_least(0, "density_margin")
        grid = self.grid
        rule, cure = (
            "must hold at least two rates, all positive, none twice",
            "use for example [1e-3, 3e-3, 1e-2]",
        )
        ok = len(grid) >= 2 and min(grid) > 0 and len(set(grid)) == len(grid)
        check(ok, "race.grid", grid, rule, cure)
        self.at_least(1, "tasks", "steps", "heldout")
