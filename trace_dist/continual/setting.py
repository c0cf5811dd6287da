"""What the methods of a run share: data, the base model, the target on this job's ranks, the tasks' masks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from trace_dist.bank.delta import check_base
from trace_dist.config import RunConfig
from trace_dist.continual.earlier import bank_before, check_apart
from trace_dist.continual.isolation.base import Isolation, load_isolation
from trace_dist.continual.judge import Judge, Row
from trace_dist.continual.masks import KINDS, is_at, is_made, project_stream
from trace_dist.data.tasks import Task
from trace_dist.masks.mask import Mask
from trace_dist.masks.ops import layouts_for, tensor_seed
from trace_dist.masks.select import Units
from trace_dist.masks.units import UnitLayout
from trace_dist.models.fingerprint import fingerprint
from trace_dist.parts import METHODS
from trace_dist.run_folder import RunFolder
from trace_dist.sharding.base import ShardedModel
from trace_dist.train.metric_log import MetricLog
from trace_dist.train.target import base_path, load_target
from trace_dist.train.validation import Validation
from trace_dist.train.workbench import Stream, Workbench
from trace_dist.utils import dist
from trace_dist.utils.log import get_logger
from trace_dist.utils.rng import random_numbers_kept
from trace_dist.utils.shared_files import present
from trace_dist.utils.together import on_all, on_main

logger = get_logger(__name__)
METHOD_OF = {"projected": "retrieved"}
"""Kind of masks -> the method whose bank holds deltas on them, where it has another name."""


@dataclass(frozen=True)
class Recipe:
    """How a method makes masks of its own.

    Attributes:
        kind: of the masks, and the name of the method.
        made_by: what the masks say of their making; others are made again.
        make: (task, units that it may not have) -> its mask. Collective.
    """

    kind: str
    made_by: str
    make: Callable[[Stream, Units], Mask]


@dataclass(frozen=True)
class Setting:
    """Where methods learn.

    Attributes:
        cfg: the run.
        bench: its data.
        base: folder or hub id of the target's base weights.
        fingerprint: of the base.
        grid: where masked methods begin to race for a rate; None where that is ``race.grid``.
    """

    cfg: RunConfig
    bench: Workbench
    base: Path | str
    fingerprint: str
    grid: list[float] | None = None

    @classmethod
    def load(cls, cfg: RunConfig) -> Setting:
        """Read the data and find the base, which must be there. Collective."""
        path = base_path(cfg.target)
        return cls(cfg, Workbench.load(cfg, path), path, fingerprint(path, together=True))

    @property
    def folder(self) -> RunFolder:
        """The run's files."""
        return self.cfg.folder

    @cached_property
    def model(self) -> ShardedModel:
        """The target on the run's backend, loaded when first used. Collective."""
        return load_target(self.cfg.target, self.cfg.backend, self.cfg.train.sequence_parallel)

    @cached_property
    def isolation(self) -> Isolation:
        """How tasks are kept off each other."""
        return load_isolation(self.cfg.mask)

    @cached_property
    def judge(self) -> Judge:
        """Scores models on the run's test sets."""
        return Judge(self.cfg, self.bench)

    @cached_property
    def base_row(self) -> Row:
        """Scores of the base, taken once; the model must hold it at the first use. Collective."""
        return self.judge.score(self.model.module)

    def mask_for(self, stream: Stream, kind: str = "projected") -> Mask:
        """A task's mask of the target, projected now if that was not done before, or at another density. Collective.

        The model must hold the base, or what the mask shall be projected onto, and is left as it was.

        Args:
            stream: the task.
            kind: projected or random; both are written together.

        Raises:
            ValueError: the proxy was not probed, or the mask is corrupt or of another model.
        """
        task = stream.task.name
        path = self.folder.mask(task, kind)
        if not on_main(path.is_file):
            self.project(stream)
        mask = on_all(lambda: Mask.load(present(path)))
        if not is_at(mask, self.cfg.mask.density):
            logger.info("%s: was made at another density; made again at %g", path, self.cfg.mask.share)
            self.project(stream)
            mask = on_all(lambda: Mask.load(present(path)))
        check_base(mask, self.fingerprint, str(path))
        name = self.cfg.mask.isolation
        # One that was given, not made here, knows of none.
        known = mask.meta.get("earlier", []) if mask.meta.get("isolation", "shared") == name else []
        refused, _ = self._refused(mask.layouts, stream, kind, known=known)
        check_apart(mask, refused, str(path), name)
        return mask

    def own_mask(self, stream: Stream, recipe: Recipe) -> Mask:
        """A task's mask of the target by a recipe, made now if that was not done before. Collective.

        Raises:
            ValueError: earlier tasks have left no room, or as the recipe does.
        """
        task, cfg = stream.task.name, self.cfg.mask
        path = self.folder.mask(task, recipe.kind)

        def made_before() -> bool:
            return path.is_file() and is_made(
                Mask.load(path), self.fingerprint, recipe.made_by, cfg.isolation
            )

        if on_main(made_before):
            return on_all(lambda: Mask.load(present(path)))
        layouts = layouts_for(self.model, "tensor", cfg.block, cfg.maskable)
        refused, meta = self._refused(
            layouts, stream, recipe.kind, lambda other: self.own_mask(other, recipe)
        )
        with random_numbers_kept():
            self.seed(task)
            mask = recipe.make(stream, refused)
        mask = mask.with_meta(task=task, model=self.fingerprint, method=recipe.made_by, **meta)
        on_main(lambda: mask.save(path))
        return mask

    def project(self, stream: Stream) -> None:
        """Write a task's projected and random mask of the target, which is left as it was, like the random numbers. Collective.

        Raises:
            ValueError: the proxy was not probed, or earlier tasks have left no room.
        """
        mask, refused, meta = self.cfg.mask, {}, {}
        layouts = layouts_for(self.model, mask.granularity, mask.block, mask.maskable)
        for kind in KINDS:
            refused[kind], meta[kind] = self._refused(layouts, stream, kind)
        with random_numbers_kept():
            self.seed(stream.task.name)
            project_stream(self.model, self.cfg, self.bench, stream, self.fingerprint, refused, meta)

    def _refused(
        self,
        layouts: Mapping[str, UnitLayout],
        stream: Stream,
        kind: str,
        mask_of: Callable[[Stream], Mask] | None = None,
        known: Collection[str] = (),
    ) -> tuple[Units, dict[str, Any]]:
        """What a task's mask may not have, and what the mask says of its isolation. Collective.

        Args:
            layouts: every maskable parameter.
            stream: the task.
            kind: of the masks.
            mask_of: gives the masks of earlier tasks; ``mask_for`` when None.
            known: tasks that are not looked at.
        """
        name = self.cfg.mask.isolation
        if name == "shared":
            return {}, {}
        bank, names = bank_before(self.cfg, METHOD_OF.get(kind, kind), self.fingerprint)
        names = [other for other in names if other not in known]
        before = [other for other in self.bench.before(stream) if other.task.name not in known]

        def masks() -> Iterator[Mask]:
            if bank is not None:
                yield from (on_all(lambda name=name: bank.mask(name)) for name in names)  # type: ignore[misc]
            yield from (mask_of(other) if mask_of else self.mask_for(other, kind) for other in before)

        meta = {"isolation": name, "earlier": [*names, *(other.task.name for other in before)]}
        return self.isolation.refused(layouts, masks()), meta

    def validation(self, streams: Sequence[Stream], score: Callable[[Task], float]) -> Validation | None:
        """What a training is looked at with: the validation examples of the tasks that it learns; None where there are none.

        Args:
            streams: these tasks.
            score: of the model in training on the test set of a task, in percent. Collective.
        """
        kept = {stream.task.name: stream.validation for stream in streams if stream.validation is not None}
        if not kept:
            return None
        examples = self.bench.one_batch(list(kept.values()))
        if self.cfg.train.eval_by == "loss":
            return Validation(examples)
        tasks = [
            replace(stream.task, test=stream.task.validation)
            for stream in streams
            if stream.task.validation is not None
        ]
        return Validation(examples, lambda: sum(map(score, tasks)) / len(tasks))

    @contextmanager
    def training(self, method: str, task: str) -> Iterator[dict[str, Any]]:
        """What every training of a task is given: its label, its log, where its checkpoints lie, what helps where it diverges;
        its random numbers begin."""
        self.seed(task)
        tag = f"{method}/{task}"
        log = MetricLog(self.folder, tag, self.cfg.train.trackers)
        yield {
            "description": tag,
            "log": log,
            "checkpoints": self.folder.checkpoints(method, task),
            "cure": self._cure(method, task),
        }
        log.close()

    def _cure(self, method: str, task: str) -> str | None:
        """What helps where this training diverges and results in the run folder keep its rate from being lowered there; None
        where nothing does."""
        folder, own = self.folder, self.cfg.continual.options.get(method, {}).get("lr")
        if any(path.stem != task for path in (folder.progress(method) / "trained").glob("*.json")):
            return "a lower rate needs another run_dir, since tasks before this one were learned with it"
        if own is None and any((*folder.methods.glob("*.json"), *folder.delta(task).parent.glob("*"))):
            if method != "train" and hasattr(METHODS.options(method), "lr"):
                return f"set continual.options.{method}.lr to a lower one and start the same command again"
            return "a lower rate needs another run_dir, since there are results that were made with it"
        return None

    def seed(self, task: str) -> None:
        """Begin a task's random numbers (dropout), so that they do not depend on what ran before it in this process."""
        torch.manual_seed(tensor_seed(self.cfg.seed, f"{task}/{dist.rank()}"))
