"""The seam between a study and a way of training.

[Note: an arm's file] A file of ``arms/`` holds one subclass of ``Arm`` under the name ``ARM``. It says how a task is trained in
a trial; a masked one says how its masks are made. Masks of all densities of a task and a seed are made together, since what is
probed serves all of them, and are kept as files.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from trace_dist.config.projection import ProjectionConfig
from trace_dist.continual.setting import Setting
from trace_dist.masks.mask import Mask
from trace_dist.masks.ops import place
from trace_dist.masks.select import Scores
from trace_dist.models.roles import describe
from trace_dist.parts import ARMS, METHODS, PLACEMENTS
from trace_dist.probe.importance import unit_importance
from trace_dist.projection.budget import project_budgets
from trace_dist.projection.site import Site
from trace_dist.studies.lab import Case, Lab
from trace_dist.studies.nested import nested_masks
from trace_dist.studies.probes import Probes
from trace_dist.studies.rates import density_key
from trace_dist.train.learner import Learner


class Arm(ABC):
    """One way of training a task.

    Args:
        name: its name in the configuration.
        lab: models and data.
        probes: dense warm starts of the lab's models.
    """

    label: ClassVar[str]
    """What the page calls it."""
    colour: ClassVar[str]
    """Its colour in the palette (report/theme.py)."""
    by_density: ClassVar[bool] = True
    """Whether it is trained at the study's densities; otherwise once."""
    masked: ClassVar[bool] = True

    def __init__(self, name: str, lab: Lab, probes: Probes) -> None:
        self.name, self.lab, self.probes = name, lab, probes

    @abstractmethod
    def trial(self, case: Case, density: float | None, lr: float) -> AbstractContextManager[Learner]:
        """Train; the result holds inside the block alone. Raises NotFinite where training diverges."""

    @abstractmethod
    def entries(self, case: Case, density: float | None) -> int:
        """Numbers that are trained."""


class Masked(Arm):
    """An arm that trains the entries of masks."""

    @abstractmethod
    def masks(self, case: Case) -> Mapping[float | None, Mask]:
        """The masks of all densities of the study; under None the only one of an arm without densities."""

    warms: ClassVar[bool] = False
    """Whether a warm start is read, of the target or of the proxy."""
    reads_proxy: ClassVar[bool] = False
    """Whether the proxy is probed."""

    def make(self, case: Case) -> dict[str, Any]:
        """Make, write and describe the masks; JSON-ready.

        ``probe_flops`` and ``probe_s`` are those of probing alone: a proxy is made once for all tasks, and the sum of gradients,
        from which first rates are predicted, has a pass of its own, which is the study's.
        """
        if self.reads_proxy:
            self.lab.prepare_proxy()
        meter = self.lab.meter
        begin, flops, reused = time.perf_counter(), meter.flops, meter.reused_s
        self.lab.seed(case)
        masks = {density_key(density): mask for density, mask in self.masks(case).items()}
        spent, seconds = meter.flops - flops, time.perf_counter() - begin + meter.reused_s - reused
        for key, mask in masks.items():
            mask.with_meta(task=case.task, seed=case.seed).save(self._path(case, key))
        # Rates are searched on the first seed.
        sums = self.lab.gradient_sums(case, masks) if case.seed == 0 else {}
        return {
            "entries": {key: mask.num_entries for key, mask in masks.items()},
            "gradient_sum": sums,
            "warm_losses": self.probes.warm_losses if self.warms else [],
            "learning": self.probes.learning if self.reads_proxy else None,
            "probe_flops": spent,
            "probe_s": seconds,
        }

    def trial(self, case: Case, density: float | None, lr: float) -> AbstractContextManager[Learner]:
        return self.lab.trained(case, self.mask(case, density), lr)

    def mask(self, case: Case, density: float | None) -> Mask:
        """A mask that was made."""
        return Mask.load(self._path(case, density_key(density)))

    def entries(self, case: Case, density: float | None) -> int:
        return self.mask(case, density).num_entries

    def is_made(self, case: Case, density: float | None) -> bool:
        """Whether a mask is on disk."""
        return self._path(case, density_key(density)).is_file()

    def _path(self, case: Case, key: str) -> Path:
        return self.lab.masks(case) / f"{self.name}-{key}.safetensors"

    def flat_budgets(self) -> dict[float, dict[str, float]]:
        """Elements of each tensor at each density of the study: alike in all tensors."""
        layouts = self.lab.layouts
        return {
            density: {name: density * layout.numel for name, layout in layouts.items()}
            for density in self.lab.study.densities
        }

    def competing(self, scores: Scores) -> dict[float | None, Mask]:
        """The best units of the whole target, at each density."""
        lab = self.lab
        found = nested_masks(lab.layouts, lab.cfg.mask.granularity, lab.study.densities, scores)
        return {density: mask for density, mask in found.items()}  # noqa: C416 - the keys' type is wider


class Scored(Masked):
    """The units of the target with the highest scores after a dense warm start of the target itself."""

    score: ClassVar[str]
    warms = True

    def masks(self, case: Case) -> dict[float | None, Mask]:
        return self.competing(self.scores(case))

    def scores(self, case: Case) -> Scores:
        """Of the units of one parameter, as selections ask for them."""
        found = self.importance(case)
        return lambda name, _: found[name]

    def importance(self, case: Case) -> dict[str, Tensor]:
        """Scores of all units."""
        return unit_importance(self.probes.target(case), self.lab.layouts, self.score)


class Placed(Masked):
    """Masks by a placement of ``projection/placements``; within the proxy's budgets where it needs them."""

    placement: ClassVar[str]
    pool: ClassVar[str | None] = None
    """What the pool holds, where the placement has one."""

    def masks(self, case: Case) -> dict[float | None, Mask]:
        lab, part = self.lab, PLACEMENTS.load(self.placement)
        needs_proxy = getattr(part, "needs_proxy", True)
        budgets = self.budgets(case) if needs_proxy else {density: {} for density in lab.study.densities}
        # A pool has the proportions of the largest mask.
        site = self._site(case, budgets[max(budgets)])
        found: Scores = part.scores(site, PLACEMENTS.options(self.placement, self._options(part)))
        if not needs_proxy:
            return self.competing(found)
        return {
            density: place(lab.layouts, lab.cfg.mask.granularity, each, found)
            for density, each in budgets.items()
        }

    def budgets(self, case: Case) -> dict[float, dict[str, float]]:
        """Elements of each tensor at each density: the proxy's, by role and relative depth."""
        lab, small = self.lab, self.lab.small
        infos = describe({name: layout.shape for name, layout in small.layouts.items()})
        ours = describe(lab.model.module)
        return {
            density: project_budgets(mask, infos, lab.layouts, ours, density)
            for density, mask in self.proxy_masks(case).items()
        }

    def proxy_masks(self, case: Case) -> dict[float, Mask]:
        """The proxy's masks at each density, by the score of the section ``probe``."""
        small, kind = self.lab.small, self.lab.cfg.mask.granularity
        scores = self.proxy_scores(case)
        return nested_masks(small.layouts, kind, self.lab.study.densities, lambda name, _: scores[name])

    def proxy_scores(self, case: Case) -> dict[str, Tensor]:
        """Parameter of the proxy -> importance of its units, by the score of the section ``probe``."""
        return unit_importance(self.probes.proxy(case), self.lab.small.layouts, self.lab.cfg.probe.score)

    def _options(self, part: Any) -> dict[str, Any]:
        """Of the configuration's options those that the placement has."""
        known = getattr(getattr(part, "Options", None), "__dataclass_fields__", {})
        given: ProjectionConfig = self.lab.cfg.projection
        options = {key: value for key, value in given.options.items() if key in known}
        return options if self.pool is None else options | {"pool": self.pool}

    def _site(self, case: Case, budgets: dict[str, float]) -> Site:
        lab, cfg = self.lab, self.lab.cfg
        return Site(
            lab.model,
            lab.layouts,
            cfg.mask.granularity,
            budgets,
            case.task,
            lambda: lab.batches(case, cfg.probe.batch_size),
            cfg.probe,
            cfg.train,
            cfg.seed + case.seed,
            {},
        )


class Method(Arm):
    """A method of ``continual/methods`` that has a model of its own."""

    method: ClassVar[str]
    by_density = False
    masked = False
    _entries = 0

    @contextmanager
    def trial(self, case: Case, density: float | None, lr: float) -> Iterator[Learner]:
        method, stream = self._method(case), self.lab.stream(case)
        self._entries = method.facts()["trainable"]
        self.lab.meter.watch(method.module)
        self.lab.seed(case)
        with method.trial(stream, stream, lr) as learner:
            yield learner

    def entries(self, case: Case, density: float | None) -> int:
        return self._entries

    def _method(self, case: Case) -> Any:
        lab, seed = self.lab, self.lab.cfg.seed + case.seed
        cfg, bench = replace(lab.cfg, seed=seed), lab.setting.bench
        setting = Setting(cfg, replace(bench, cfg=cfg), lab.setting.base, lab.setting.fingerprint)
        options = METHODS.options(self.method, cfg.continual.options.get(self.method, {}))
        return METHODS.load(self.method).METHOD(self.method, setting, options)


def load_arm(name: str, lab: Lab, probes: Probes) -> Arm:
    """An arm by its name."""
    found: Arm = ARMS.load(name).ARM(name, lab, probes)
    return found
