"""The study small-to-large: when is a probed mask worth its probe, and does a projected one keep the gain?

    trace-dist study small-to-large --config configs/study-small-to-large.yaml

Every piece of work (a mask, a training) ends in a record; a study that was cut goes on behind the last one. What matters most
stands first in the configuration, so that a study that was cut says something.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trace_dist.config import RunConfig
from trace_dist.config.checks import check
from trace_dist.parts import ARMS
from trace_dist.studies.arm import Arm, Masked, load_arm
from trace_dist.studies.lab import Case, Lab
from trace_dist.studies.local_tasks import with_local_tasks
from trace_dist.studies.plan import StudyConfig
from trace_dist.studies.probes import Probes
from trace_dist.studies.rates import density_key
from trace_dist.studies.records import Journal, Records
from trace_dist.studies.schedule import Job, Make, Schedule, ScoreBase, Train, Traits
from trace_dist.studies.settings import abouts, shown
from trace_dist.studies.stopping import Stopped, stopping
from trace_dist.studies.summary import is_undecided, summarise
from trace_dist.utils.env import meta_info, run_info
from trace_dist.utils.files import write_json
from trace_dist.utils.finite import NotFinite, check_finite
from trace_dist.utils.locks import hold_until_exit
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)


def run_study(
    cfg: RunConfig, study: StudyConfig, hours: float | None = None, only: Sequence[str] | None = None
) -> dict[str, Any]:
    """Work on the study until it is complete or the time is over; write what it says.

    Args:
        cfg: models, tasks, and how masks are made and trained.
        study: what is compared.
        hours: after which no piece of work is begun that would last longer; 0 sums up what is known, None sets no limit.
        only: tasks that this process works on, while others work on others; all when None.

    Returns:
        The summary, as it was written.

    Raises:
        ValueError: there is no such task, or another process works on one.
    """
    begin = time.monotonic()
    cfg = with_local_tasks(cfg, study.local_tasks)
    _hold(cfg, only)
    path = Path(study.records) if study.records else cfg.folder.root / "records.jsonl"
    journal = Journal(path, abouts(cfg, study))
    records = journal.read()
    names = [task.name for task in cfg.tasks]
    classes = {name: ARMS.load(name).ARM for name in study.arms}
    traits = {name: Traits(arm.by_density, arm.masked) for name, arm in classes.items()}
    schedule = Schedule(study, names, traits, lambda found, cell: is_undecided(found, cell, study.reference))
    worker = Worker(cfg, study, journal, records)
    try:
        with stopping():
            while (job := schedule.next_job(records, only)) is not None:
                left = None if hours is None else 3600 * hours - (time.monotonic() - begin)
                if left is not None and left <= worker.expected(job):
                    logger.info("study: the time is over; start the same command again to go on")
                    break
                worker.do(job)
    except Stopped:
        logger.info("study: stopped; start the same command again to go on")
    # Others may have written more meanwhile.
    return write_summary(cfg, study, records if only is None else journal.read(), schedule)


def _hold(cfg: RunConfig, only: Sequence[str] | None) -> None:
    """Hold the run, or some of its tasks: who holds the run holds all tasks."""
    names = [task.name for task in cfg.tasks]
    for name in only or ():
        if name not in names:
            raise ValueError(f"only={name!r}: the study has no such task; choose among {', '.join(names)}")
    if only is None:
        hold_until_exit(cfg.folder.lock, f"run_dir={cfg.run_dir!r}")
    for name in names if only is None else dict.fromkeys(only):
        hold_until_exit(cfg.folder.root / f".lock.{name}", f"only={name!r}")


def write_summary(cfg: RunConfig, study: StudyConfig, records: Records, schedule: Schedule) -> dict[str, Any]:
    """Write what the records say by now."""
    missing = {cell for cell, _ in schedule.pending(records)}
    labels = {name: ARMS.load(name).ARM for name in study.arms}
    # What trained, where the records say so: another machine may have summed up.
    hardware = {"hardware": ", ".join(records.hardware)} if records.hardware else {}
    result = {
        "run_info": run_info(),
        "meta_info": meta_info() | hardware,
        "settings": _settings(cfg, study),
        "arms": {name: {"label": arm.label, "colour": arm.colour} for name, arm in labels.items()},
        "complete": not missing,
        "cells_missing": len(missing),
        **summarise(records, study, [task.name for task in cfg.tasks]),
    }
    out = Path(study.out) if study.out else cfg.folder.root / "study.json"
    write_json(out, result)
    logger.info("study: %d trainings so far; what they say: %s", records.num_trials, out)
    return result


def _settings(cfg: RunConfig, study: StudyConfig) -> dict[str, Any]:
    return {**shown(cfg), "study": asdict(study), "densities": study.densities}


class Worker:
    """Does pieces of work, and keeps a record of each.

    Args:
        cfg: the run.
        study: what is compared.
        journal: where records are written.
        records: to which they are added.
    """

    def __init__(self, cfg: RunConfig, study: StudyConfig, journal: Journal, records: Records) -> None:
        self._cfg, self._study, self._journal, self._records = cfg, study, journal, records
        self._lab: Lab | None = None
        self._probes: Probes | None = None
        self._longest: dict[type, float] = {}
        self._hardware = meta_info()["hardware"]

    @property
    def lab(self) -> Lab:
        """Models and data, loaded when something is to be done."""
        if self._lab is None:
            self._lab = Lab(self._cfg, self._study)
        return self._lab

    def expected(self, job: Job) -> float:
        """Seconds that a piece of work may take: the longest of its kind so far, in this life."""
        return self._longest.get(type(job), 0.0)

    def do(self, job: Job) -> None:
        """Do a piece of work and write its record."""
        begin = time.perf_counter()
        record = {ScoreBase: self._score, Make: self._make, Train: self._train}[type(job)](job)  # type: ignore[operator]
        seconds = time.perf_counter() - begin
        record = {"date": run_info()["date"], "hardware": self._hardware, **record, "seconds": seconds}
        self._journal.append(record)
        self._records.add(record)
        self._longest[type(job)] = max(seconds, self._longest.get(type(job), 0.0))

    def _score(self, job: ScoreBase) -> dict[str, Any]:
        lab = self.lab
        found, text = lab.test(lab.base(), job.task), lab.text(lab.base())
        validation = lab.validate(lab.base(), job.task).loss
        for loss in (found.loss, text.loss, validation):
            rule, cure = "the base has such a loss", "use another target.dtype, or another model"
            check(math.isfinite(loss), f"tasks.{job.task}: loss", loss, rule, cure)
        logger.info("%s: base: loss %.4f, general text %.4f", job.task, found.loss, text.loss)
        return {
            "kind": "base",
            "task": job.task,
            "losses": _rounded(found.nats),
            "right": [int(each) for each in found.right],
            "tokens": found.tokens,
            "validation": validation,
            "text": text.loss,
            "majority_percent": self._task(job.task).majority_percent,
            "overlap_percent": self._task(job.task).overlap_percent,
        }

    def _make(self, job: Make) -> dict[str, Any]:
        arm = self._arm(job.arm)
        if not isinstance(arm, Masked):
            raise AssertionError(f"{job.arm}: has no masks")
        made = arm.make(Case(job.task, job.seed))
        logger.info("%s, %s, seed %d: masks in %.0f s", job.arm, job.task, job.seed, made["probe_s"])
        return {"kind": "mask", "arm": job.arm, "task": job.task, "seed": job.seed, **made}

    def _train(self, job: Train) -> dict[str, Any]:
        lab, (name, task, density) = self.lab, job.cell
        case, arm, meter = Case(task, job.seed), self._arm(name), self.lab.meter
        if isinstance(arm, Masked) and not arm.is_made(case, density):
            # It was recorded, and somebody has deleted it.
            arm.make(case)
        record: dict[str, Any] = {"kind": "trial", "arm": name, "task": task, "density": density}
        record |= {"seed": job.seed, "lr": job.lr, "losses": None, "right": None, "text": None}
        begin, flops = time.perf_counter(), meter.flops
        before = self._records.best(job.cell, job.seed)
        try:
            with arm.trial(case, density, job.lr) as learner:
                record |= {"train_s": time.perf_counter() - begin, "train_flops": meter.flops - flops}
                record["validation"] = _finite(lab.validate(learner, task).loss)
                if before is None or record["validation"] < before.validation:
                    found, text = lab.test(learner, task), _finite(lab.text(learner).loss)
                    _finite(found.loss)
                    record |= {"losses": _rounded(found.nats), "right": [int(each) for each in found.right]}
                    record["text"] = text
        except NotFinite:
            record |= {"validation": None, "train_s": time.perf_counter() - begin}
            record["train_flops"] = meter.flops - flops
        record["entries"] = arm.entries(case, density)
        shown = "diverged" if record["validation"] is None else f"{record['validation']:.4f}"
        logger.info(
            "%s, %s, %s, seed %d, lr %g: %s", name, task, density_key(density), job.seed, job.lr, shown
        )  # fmt: skip
        return record

    def _arm(self, name: str) -> Arm:
        if self._probes is None:
            self._probes = Probes(self.lab)
        return load_arm(name, self.lab, self._probes)

    def _task(self, name: str) -> Any:
        return next(each.task for each in self.lab.setting.bench.tasks if each.task.name == name)


def _finite(loss: float) -> float:
    """A loss of what was trained; raises NotFinite where it is none."""
    check_finite(loss, "a held-out loss")
    return loss


def _rounded(values: list[float]) -> list[float]:
    """To a ten-thousandth: a record holds hundreds."""
    return [round(value, 4) for value in values]
