"""The ways of learning on masks, on the ranks of a job: ``rank_script.py FOLDER``; whole, and cut inside each task."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from continual.small import CHECKPOINT_EVERY, make_config

from trace_dist.config import RunConfig
from trace_dist.continual.driver import run_continual
from trace_dist.continual.methods.trace import METHOD, Options
from trace_dist.continual.setting import Setting
from trace_dist.data.batches import Batches, Step
from trace_dist.utils import dist

METHODS = ("retrieved", "merged", "consolidated")
CUTS = (CHECKPOINT_EVERY + 2, 1, CHECKPOINT_EVERY + 2)
"""Batches of a training after which all ranks stop: inside the first task, at the start of the second, inside it."""


class Cut(Exception):
    """The ranks died."""


def run_until(cfg: RunConfig, number: int) -> None:
    """Run until batch ``number`` of some training at the run's batch size."""
    following = Batches.__next__

    def mortal(self: Batches) -> Step:
        batch = following(self)
        if self._batch_size == cfg.train.batch_size and self._consumed == number * cfg.train.batch_size:
            raise Cut
        return batch

    Batches.__next__ = mortal  # type: ignore[method-assign]
    try:
        run_continual(cfg)
    except Cut:
        return
    finally:
        Batches.__next__ = following  # type: ignore[method-assign]
    raise AssertionError(f"batch {number} never came")


def make_masks(cfg: RunConfig) -> None:
    """TRACE's masks of all tasks."""
    setting = Setting.load(cfg)
    trace = METHOD("trace", setting, Options())
    for stream in setting.bench.tasks:
        trace.mask(stream)


def main() -> None:
    """One run that is whole, one that is cut, and masks alone."""
    dist.init_distributed()
    # deepspeed puts --local_rank before it
    folder = Path(sys.argv[-1])
    run_continual(replace(make_config(folder, METHODS, "ranks-whole"), backend="zero3"))
    for method in METHODS:
        cfg = replace(make_config(folder, [method], "ranks-cut"), backend="zero3")
        for number in CUTS:
            run_until(cfg, number)
        run_continual(cfg)
    make_masks(replace(make_config(folder, ["trace"], "ranks-masks"), backend="zero3"))
    dist.close()


if __name__ == "__main__":
    main()
