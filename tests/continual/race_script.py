"""The race of both ways of learning on masks, on the ranks of a job: ``race_script.py FOLDER``; each rank writes what it saw."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from continual.small import make_config

from trace_dist.config import RaceConfig
from trace_dist.continual.density import with_density
from trace_dist.continual.driver import check_methods
from trace_dist.continual.race import held_race
from trace_dist.continual.setting import Setting
from trace_dist.utils import dist
from trace_dist.utils.files import write_json

METHODS = ("retrieved", "merged")
RACE = RaceConfig([1e-7, 1e-2, 1e30], steps=8, heldout=21)
"""The first rate changes nothing, the last one diverges; the held-out examples do not divide by two."""


def main() -> None:
    """A race of each method."""
    dist.init_distributed()
    # deepspeed puts --local_rank before it
    folder = Path(sys.argv[-1])
    cfg = replace(make_config(folder, METHODS, "ranks-race"), backend="zero3", race=RACE)
    setting = Setting.load(cfg)
    before = setting.model.full_state_dict()
    for entry in check_methods(cfg):
        method = entry.kind(entry.name, setting, entry.options)
        found = held_race(setting, entry.name, [setting.bench.tasks[0]], method.trial)
        after = setting.model.full_state_dict()
        same = all(torch.equal(after[name], value) for name, value in before.items())
        about = {"rates": found.to_json(), "lr": found.lr, "restored": same}
        write_json(folder / f"race-{entry.name}-{dist.rank()}.json", about)
    settled = with_density(of_densities(setting))
    after = setting.model.full_state_dict()
    same = all(torch.equal(after[name], value) for name, value in before.items())
    about = {"density": settled.cfg.mask.density, "rates": settled.grid, "restored": same}
    write_json(folder / f"density-{dist.rank()}.json", about)
    dist.close()


def of_densities(setting: Setting) -> Setting:
    """The run with a density that is raced for, on the same model."""
    cfg, race = setting.cfg, replace(RACE, grid=[1e-7, 1e-2], tasks=1, densities=[0.1, 0.3])
    mask, train = replace(cfg.mask, density="auto"), replace(cfg.train, lr="auto")
    raced = replace(setting, cfg=replace(cfg, race=race, mask=mask, train=train))
    vars(raced)["model"] = setting.model
    return raced


if __name__ == "__main__":
    main()
