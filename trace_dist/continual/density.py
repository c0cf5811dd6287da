"""``mask.density: auto``: the smallest density whose loss in a short race is within a margin of the best.

[Note: density and rate] The best learning rate differs between densities by factors of ten, so each density races for its own,
by the rule of every race (continual/race.py): the mask of the run's placement is trained on the run's first tasks for a few steps
with each rate, and the least held-out loss counts. Densities are raced from the largest one down, and the grid of each is that of
``race.grid``, moved to where the density before it had its best rate: neighbours lie close, and a race goes beyond its
grid where it must. What was found decides the density of all tasks; masked methods then race for their rates from there. Earlier
tasks' entries are not refused in the race, whatever ``mask.isolation`` says.

Nothing of the races is left in weights, random numbers or files but their records, from which a run that was cut goes on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trace_dist.config.checks import AUTO
from trace_dist.config.how_it_runs import decisive
from trace_dist.continual.learn import try_rate
from trace_dist.continual.masks import masks_made_with, projected_mask
from trace_dist.continual.progress import examples_digest
from trace_dist.continual.race import Race, held_race
from trace_dist.continual.setting import Setting
from trace_dist.masks.mask import Mask
from trace_dist.train.learner import Learner
from trace_dist.train.workbench import Stream
from trace_dist.utils.files import reading
from trace_dist.utils.log import get_logger
from trace_dist.utils.rng import random_numbers_kept
from trace_dist.utils.sealed import read_record, write_record
from trace_dist.utils.together import on_main

logger = get_logger(__name__)


@dataclass(frozen=True)
class DensityRace:
    """How the densities did.

    Attributes:
        races: density -> its race; rising.
        margin: nats per answer token that a loss may lie above the best one.
    """

    races: Mapping[float, Race]
    margin: float

    @property
    def density(self) -> float:
        """The smallest one whose least loss is within the margin of the best; rates that win may lie ``LEVEL`` above it."""
        losses = {density: race.losses[race.best] for density, race in self.races.items()}
        return min(density for density, loss in losses.items() if loss <= min(losses.values()) + self.margin)

    @property
    def lr(self) -> float:
        """The rate that won at that density."""
        return self.races[self.density].lr

    def to_json(self) -> dict[str, Any]:
        """JSON-ready: the density, the margin, and what was tried: the rate that won, and the least loss."""
        tried = [
            {"density": density, "lr": race.lr, "loss": race.losses[race.best], "rates": race.to_json()}
            for density, race in self.races.items()
        ]
        return {"density": self.density, "margin": self.margin, "tried": tried}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DensityRace:
        """What ``to_json`` gave."""
        races = {float(each["density"]): Race.from_json(each["rates"]) for each in value["tried"]}
        return cls(races, float(value["margin"]))


def with_density(setting: Setting) -> Setting:
    """The setting with a number for ``mask.density``: raced now, or read where it was raced before. Collective.

    Raises:
        ValueError: the proxy has not been probed, or every rate diverges.
    """
    if setting.cfg.mask.density != AUTO:
        return setting
    path = setting.folder.density
    streams = setting.bench.tasks[: setting.cfg.race.tasks]
    about = _about(setting, streams)
    found = on_main(lambda: read_density(path, about))
    if found is None:
        with random_numbers_kept():
            found = _race(setting, streams)
        record = {"about": about, **found.to_json()}
        on_main(lambda: write_record(path, record))
        logger.info("mask.density: %g has won the race, with lr %g", found.density, found.lr)
    return _settled(setting, found.density, moved(setting.cfg.race.grid, found.lr))


def _settled(setting: Setting, density: float, grid: Sequence[float]) -> Setting:
    """The same run at one density; the model, where it is loaded, is shared."""
    settled = replace(setting, cfg=setting.cfg.at_density(density), grid=list(grid))
    if "model" in vars(setting):
        vars(settled)["model"] = setting.model
    return settled


def _race(setting: Setting, streams: Sequence[Stream]) -> DensityRace:
    races: dict[float, Race] = {}
    grid: Sequence[float] = setting.cfg.race.grid
    setting.model  # noqa: B018 - loaded once for all densities
    for density in sorted(setting.cfg.race.densities, reverse=True):
        races[density] = _race_at(_settled(setting, density, grid), density, streams)
        race, lr = races[density], races[density].lr
        logger.info("mask.density %g: held-out loss %.4f, lr %g", density, race.losses[race.best], lr)
        grid = moved(setting.cfg.race.grid, lr)
    return DensityRace(dict(sorted(races.items())), setting.cfg.race.density_margin)


def _race_at(setting: Setting, density: float, streams: Sequence[Stream]) -> Race:
    masks: dict[str, Mask] = {}
    name = f"density-{density:g}"

    def trial(stream: Stream, part: Stream, lr: float) -> AbstractContextManager[Learner]:
        if stream.task.name not in masks:
            # Made when first used: a race that was held before needs none. Random numbers begin as for its file.
            setting.seed(stream.task.name)
            masks[stream.task.name] = projected_mask(
                setting.model, setting.cfg, setting.bench, stream, setting.fingerprint, {}
            )
            setting.seed(stream.task.name)
        return try_rate(setting, masks[stream.task.name], stream, part, lr, name=name)

    return held_race(setting, name, streams, trial, grid=setting.grid, about=masks_made_with(setting.cfg))


def moved(grid: Sequence[float], lr: float) -> list[float]:
    """A grid of the same spacing around a rate: its geometric middle goes there, or as near as whole places of it come."""
    rates = sorted(grid)
    middle = rates[len(rates) // 2]
    return [float(f"{rate * lr / middle:.3g}") for rate in rates]


def _about(setting: Setting, streams: Sequence[Stream]) -> dict[str, Any]:
    """What the race depends on."""
    cfg = setting.cfg
    sections = {"race": asdict(cfg.race), "train": asdict(cfg.train), **masks_made_with(cfg)}
    found: dict[str, Any] = decisive(
        {**sections, "examples": examples_digest(streams), "model": setting.fingerprint}
    )
    return found


def read_density(path: Path, about: dict[str, Any]) -> DensityRace | None:
    """A race that was held under the same conditions."""
    if not path.is_file():
        return None
    found = read_record(path, "delete it to let the densities race again", bare=True)
    if decisive(found.get("about")) != about:
        return None
    with reading(path, "race of densities"):
        race = DensityRace.from_json(found)
        numbers = (race.density, race.lr, race.races[race.density].losses[race.lr])
        if not (all(map(math.isfinite, numbers)) and 0 < race.density <= 1 and race.lr > 0):
            raise ValueError("its density or rate is none")
        return race
