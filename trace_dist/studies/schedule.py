"""What a study does next: a function of its records alone, so that a study that was cut goes on as if it had not been."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from trace_dist.studies.plan import StageConfig, StudyConfig
from trace_dist.studies.rates import first_rate, is_bracketed, next_rate, tried_in
from trace_dist.studies.records import Cell, Records


@dataclass(frozen=True)
class ScoreBase:
    """Score the base on a task."""

    task: str


@dataclass(frozen=True)
class Make:
    """Make an arm's masks for a task, at all densities."""

    arm: str
    task: str
    seed: int


@dataclass(frozen=True)
class Train:
    """Train a cell once."""

    cell: Cell
    seed: int
    lr: float


Job = ScoreBase | Make | Train


@dataclass(frozen=True)
class Traits:
    """What the schedule knows of an arm.

    Attributes:
        by_density: whether it has a mask of the study's densities; otherwise it is trained once.
        masked: whether it has a mask at all.
    """

    by_density: bool
    masked: bool


@dataclass(frozen=True)
class Schedule:
    """The order of a study.

    Attributes:
        study: its configuration.
        tasks: names, in order.
        traits: of each arm.
        undecided: whether the interval of a cell's difference to the reference holds zero.
    """

    study: StudyConfig
    tasks: Sequence[str]
    traits: dict[str, Traits]
    undecided: Callable[[Records, Cell], bool]

    def next_job(self, records: Records, only: Collection[str] | None = None) -> Job | None:
        """The next piece of work on some tasks, on all when None; None where it is done."""
        return next((job for _, job in self.pending(records, only)), None)

    def pending(self, records: Records, only: Collection[str] | None = None) -> Iterator[tuple[Cell, Job]]:
        """The cells that lack something by now, and of each the next piece."""
        tasks = [task for task in self.tasks if only is None or task in only]
        for stage in self.study.stages:
            for seed in range(stage.seeds):
                for cell in self._cells(stage, tasks):
                    if stage.undecided and seed > 0 and not self._asked(records, cell):
                        continue
                    job = self._of(records, cell, seed)
                    if job is not None:
                        yield cell, job

    def _cells(self, stage: StageConfig, tasks: Sequence[str]) -> Iterator[Cell]:
        """Task by task, so that arms can be compared as soon as possible."""
        for task in tasks:
            seen = set[Cell]()
            for density in stage.densities:
                for arm in stage.arms:
                    cell = Cell(arm, task, density if self.traits[arm].by_density else None)
                    if cell not in seen:
                        seen.add(cell)
                        yield cell

    def _asked(self, records: Records, cell: Cell) -> bool:
        """Whether another seed of a cell could decide something: of the reference where any arm beside it is undecided."""
        if cell.arm != self.study.reference:
            return self.undecided(records, cell)
        others = (Cell(arm, cell.task, cell.density) for arm in self.study.arms if arm != cell.arm)
        return any(self.undecided(records, other) for other in others)

    def _of(self, records: Records, cell: Cell, seed: int) -> Job | None:
        """The next piece of a cell, None where it is complete."""
        study, made = self.study, (cell.arm, cell.task, seed) in records.masks
        if cell.task not in records.bases:
            return ScoreBase(cell.task)
        if seed > 0:
            best = records.best(cell)
            # A rate is tuned on the first seed.
            if best is None or records.of(cell, seed) or not is_bracketed(tried_in(records, cell)):
                return None
            lr: float | None = best.lr
        else:
            first = first_rate(records, cell, self.tasks, study.rule, study.first_rates)
            lr = next_rate(tried_in(records, cell), first, study.max_rates)
        if lr is None:
            return None
        if self.traits[cell.arm].masked and not made:
            return Make(cell.arm, cell.task, seed)
        return Train(cell, seed, lr)
