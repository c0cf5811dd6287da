"""The race: which peak learning rate a method trains with where the configuration says ``auto``.

[Note: the race] A method trains the run's first two tasks for a few steps each with every rate of a grid: from the same
start, on the same batches, with the same random numbers. After a warm-up of at most half of the race its rate falls as in the
whole training of the task, of which the race is the beginning: one that fell to the end within the race would bear peaks that
are too high for a long training. The rate whose answer loss on held-out training examples, or on the validation examples of a
run that has them, is least on average wins; it is taken just after each task was trained. Of rates that are level within 5 %
the lowest wins, since a short training still bears higher rates than a long one: 5 % of the loss, and of what the best rate has
won since the start, too, or a rate that learns nothing would be level where a short training wins little. One that diverges has
lost. Where the winner is the lowest or the highest rate, the next one beyond it races too.

Two tasks, since a rate can be the best for the first one and leave weights that learn no other: a method that goes on from what
earlier tasks left does so in the race too. Not more: what comes later is not known when a stream begins. Every method
is given the same trials. A rate that wins a short race may be too high for a long training; that holds for every method alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trace_dist.config import RaceConfig
from trace_dist.config.how_it_runs import decisive
from trace_dist.continual.progress import examples_digest
from trace_dist.continual.setting import Setting
from trace_dist.data.batches import Step
from trace_dist.data.validation import MOST_HELDOUT
from trace_dist.train.learner import Learner
from trace_dist.train.validation import answer_loss
from trace_dist.train.workbench import Stream
from trace_dist.utils import dist
from trace_dist.utils.files import reading
from trace_dist.utils.finite import NotFinite
from trace_dist.utils.log import get_logger
from trace_dist.utils.rng import random_numbers_kept
from trace_dist.utils.sealed import read_record, write_record
from trace_dist.utils.together import on_main

logger = get_logger(__name__)

LEVEL = 0.05
"""Share of the best loss, and of what it lies below the start, by which a loss may lie above it and still be level with it."""
MOST_EXTENSIONS = 4
"""Rates beyond the grid that may race: a grid that suits masks begins far above the rates of full fine-tuning."""
Trial = Callable[[Stream, Stream, float], AbstractContextManager[Learner]]
"""``Method.trial``."""


@dataclass(frozen=True)
class Race:
    """How the rates did.

    Attributes:
        losses: rate -> nats per answer token of the held-out examples, infinite where training diverged; rising rates.
        start: the same before any training; None where it was not asked for.
    """

    losses: Mapping[float, float]
    start: float | None = None

    @property
    def best(self) -> float:
        """The rate with the least loss."""
        return min(self.losses, key=self.losses.__getitem__)

    @property
    def lr(self) -> float:
        """The rate that won: the lowest of those that are level with the best."""
        best = self.losses[self.best]
        margin = LEVEL * (best if self.start is None else min(best, max(self.start - best, 0.0)))
        return min(rate for rate, loss in self.losses.items() if loss <= best + margin)

    def to_json(self) -> list[dict[str, Any]]:
        """JSON-ready; no loss where training diverged, and no start where it was not asked for."""
        start = {} if self.start is None else {"start": self.start}
        return [
            {"lr": lr, "loss": loss if math.isfinite(loss) else None, **start}
            for lr, loss in self.losses.items()
        ]

    @classmethod
    def from_json(cls, value: list[dict[str, Any]]) -> Race:
        """What ``to_json`` gave."""
        losses = {each["lr"]: math.inf if each["loss"] is None else each["loss"] for each in value}
        return cls(losses, value[0].get("start") if value else None)


def race_rates(
    grid: list[float], measure: Callable[[float], float], untrained: Callable[[], float] | None = None
) -> Race:
    """Let the rates of a grid race, and up to ``MOST_EXTENSIONS`` beyond it.

    Args:
        grid: two or more.
        measure: the loss that a rate leads to; infinite or NaN where it diverges.
        untrained: the loss before any training; asked where another rate than the best may win.

    Raises:
        ValueError: every rate diverges.
    """
    losses: dict[float, float] = {}
    start: float | None = None
    waiting = sorted(grid)
    for extensions in range(MOST_EXTENSIONS + 1):
        for lr in waiting:
            loss = measure(lr)
            losses[lr] = loss if math.isfinite(loss) else math.inf
        race = Race(dict(sorted(losses.items())), start)
        if untrained is not None and start is None and race.lr != race.best:
            start = untrained()
            race = replace(race, start=start)
        waiting = _beyond(race)
        if not waiting or extensions == MOST_EXTENSIONS:
            break
    if math.isinf(losses[race.lr]):
        tried = ", ".join(f"{lr:g}" for lr in race.losses)
        raise ValueError(f"race.grid={grid}: training diverges at each of {tried}; lower the rates")
    return race


def _beyond(race: Race) -> list[float]:
    """The rate beyond the winner where that is the lowest or the highest, as far away as its neighbour; else none."""
    rates = list(race.losses)
    pairs = {rates[0]: rates[1], rates[-1]: rates[-2]}
    return [float(f"{race.lr**2 / pairs[race.lr]:.3g}")] if race.lr in pairs else []


def held_race(
    setting: Setting,
    name: str,
    streams: Sequence[Stream],
    trial: Trial,
    continues: bool = False,
    grid: list[float] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Race:
    """The race of a method, from its progress if it was held before. Collective.

    The method, the random numbers and the place in the data are as before, bit for bit.

    Args:
        setting: the run.
        name: of the method, for its files and logs.
        streams: the tasks that are raced on.
        trial: trains part of a task with a rate (``Method.trial``).
        continues: each task is trained on the weights that those before it left (``Method.continues``).
        grid: rates to begin with; those of the configuration when None.
        about: what the trials depend on beside the model, the examples and how they are trained on, JSON-ready.

    Raises:
        ValueError: training diverges at every rate, or as it does.
    """
    cfg, path = setting.cfg.race, setting.folder.race(name)
    cfg = cfg if grid is None else replace(cfg, grid=grid)
    conditions = decisive(
        {
            "race": asdict(cfg),
            "train": asdict(setting.cfg.train),
            "examples": examples_digest(streams),
            "horizons": [stream.steps for stream in streams],
            "model": setting.fingerprint,
            **(about or {}),
        }
    )
    kept = on_main(lambda: _read(path, conditions))
    if kept is not None:
        return kept
    course = _Course.of(setting, name, streams, cfg, trial, continues)
    with random_numbers_kept():
        race = race_rates(cfg.grid, course.loss, lambda: course.loss(min(cfg.grid), trained=False))
    logger.info("%s: lr %g has won the race", name, race.lr)
    if _beyond(race):
        logger.warning(
            "%s: lr %g has won the race and is at the edge of all rates that raced; a better one may lie beyond: move race.grid",
            name,
            race.lr,
        )
    on_main(lambda: write_record(path, {"about": conditions, "rates": race.to_json()}))
    return race


@dataclass(frozen=True)
class _Course:
    """What every rate trains on, from the same start, and is compared by.

    Attributes:
        setting: the run.
        name: of the method, for logs.
        parts: of each task the stream, the part of it that is trained on, and one global batch of held-out examples.
        trial: as for ``held_race``, and ``continues`` likewise.
    """

    setting: Setting
    name: str
    parts: list[tuple[Stream, Stream, Step]]
    trial: Trial
    continues: bool

    @classmethod
    def of(
        cls,
        setting: Setting,
        name: str,
        streams: Sequence[Stream],
        cfg: RaceConfig,
        trial: Trial,
        continues: bool,
    ) -> _Course:
        """Of the tasks of a race."""
        parts = []
        for stream in streams:
            part, heldout = split(stream, cfg, setting.cfg.seed)
            parts.append((stream, part, setting.bench.one_batch([heldout.encoded])))
        return cls(setting, name, parts, trial, continues)

    def loss(self, lr: float, trained: bool = True) -> float:
        """Held-out nats per answer token after each task, on average; with ``trained`` false, before any training. Collective."""
        losses = []
        with ExitStack() as trials:
            for stream, part, step in self.parts:
                part = part if trained else replace(part, steps=0)
                self.setting.seed(stream.task.name)
                losses.append(_loss_after(self.trial(stream, part, lr), step, trials))
                if math.isinf(losses[-1]):
                    break
                if not self.continues:
                    trials.close()
        loss = float(dist.broadcast_object(sum(losses) / len(losses)))
        if trained:
            tasks = " and ".join(f"{part.steps} steps of {part.task.name}" for _, part, _ in self.parts)
            logger.info("%s: lr %g: held-out loss %.4f after %s", self.name, lr, loss, tasks)
        else:
            logger.info("%s: held-out loss %.4f before training", self.name, loss)
        return loss


def kept_race(setting: Setting, name: str) -> Race:
    """The race that chose the rate of the tasks that a method has finished: it is never held again among them. Collective.

    Raises:
        ValueError: it is missing or damaged.
    """
    path = setting.folder.race(name)

    def read() -> Race:
        if not path.is_file():
            raise ValueError(
                f"{path}: is missing, and {name} has finished tasks with the rate that won this race; restore it, or delete "
                f"{path.parent} to begin anew"
            )
        found = read_record(path, f"restore it, or delete {path.parent} to begin anew", bare=True)
        with reading(path, "race"):
            return Race.from_json(found["rates"])

    return on_main(read)


def split(stream: Stream, cfg: RaceConfig, seed: int) -> tuple[Stream, Stream]:
    """What the rates train on, for the steps of the race, and what they are compared by: the validation examples, or, where the
    run has none, a part of the training examples, which is held out."""
    part = replace(stream, steps=min(cfg.steps, stream.steps))
    if stream.validation is not None:
        return part, replace(part, encoded=stream.validation)
    count = len(stream.encoded)
    heldout = max(1, min(cfg.heldout, int(MOST_HELDOUT * count)))
    order = np.random.default_rng(seed).permutation(count)
    parts = (stream.encoded.select(sorted(rows)) for rows in (order[heldout:], order[:heldout]))
    first, second = (replace(part, encoded=rows) for rows in parts)
    return first, second


def _loss_after(trial: AbstractContextManager[Learner], step: Step, trained: ExitStack) -> float:
    """Nats per answer token of a global batch after a trial, which holds until ``trained`` is closed; infinite where it diverges.

    Collective.
    """
    try:
        return answer_loss(trained.enter_context(trial), step)
    except NotFinite:
        return math.inf


def _read(path: Path, about: dict[str, Any]) -> Race | None:
    """A race that was held under the same conditions."""
    if not path.is_file():
        return None
    found = read_record(path, "delete it to let the rates race again", bare=True)
    if decisive(found.get("about")) != about:
        return None
    with reading(path, "race"):
        return Race.from_json(found["rates"])
