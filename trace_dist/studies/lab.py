"""What all arms of a study work with: the target, which is loaded once, the proxy, the data, and what was probed of the two.

Every training and every probe leaves the target as it was, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trace_dist.config import RunConfig
from trace_dist.continual.learn import put_back
from trace_dist.continual.race import split
from trace_dist.continual.setting import Setting
from trace_dist.data.batches import Batches
from trace_dist.data.encoding import encode, pad_id
from trace_dist.masks.mask import Mask
from trace_dist.masks.ops import layouts_for, tensor_seed
from trace_dist.masks.units import UnitLayout
from trace_dist.models.fingerprint import fingerprint
from trace_dist.models.loading import load_model
from trace_dist.stages.base import prepare_base
from trace_dist.studies.heldout import AsIs, Asked, HeldOut, Rows, find_text, held_out, passages
from trace_dist.studies.meter import Meter
from trace_dist.studies.plan import StudyConfig
from trace_dist.studies.settings import abouts
from trace_dist.train.learner import Learner, MaskedLearner
from trace_dist.train.loss import accumulate
from trace_dist.train.task import train_mask
from trace_dist.train.workbench import Stream, Workbench
from trace_dist.utils import dist
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)
EVAL_BATCH = 16
"""Held-out examples per forward pass."""


@dataclass(frozen=True)
class Case:
    """One task under one seed of mask and order."""

    task: str
    seed: int


@contextmanager
def on_device(module: nn.Module) -> Iterator[None]:
    """Inside the block a model is on this rank's device, afterwards where it was: idle, it would take the room of a training."""
    before = next(module.parameters()).device
    module.to(dist.local_device())
    try:
        yield
    finally:
        module.to(before)


@dataclass(frozen=True)
class Small:
    """The proxy: the model in fp32 in host memory, its maskable parameters, and the tasks in its tokens."""

    module: nn.Module
    layouts: dict[str, UnitLayout]
    bench: Workbench


class Lab:
    """A study's models and data.

    Args:
        cfg: the run: models, tasks, how masks are made and trained.
        study: what is compared.
    """

    def __init__(self, cfg: RunConfig, study: StudyConfig) -> None:
        self.cfg, self.study = cfg, study
        path = prepare_base(cfg, "target")
        bench = Workbench.load(cfg, path, study.plain)
        self.setting = Setting(cfg, bench, path, fingerprint(path))
        self.meter = Meter()

    @cached_property
    def model(self) -> Any:
        """The target."""
        model = self.setting.model
        self.meter.watch(model.module)
        return model

    @cached_property
    def dense(self) -> nn.Module:
        """The target in fp32, for dense warm starts: itself, or a second copy in host memory where masks are trained in bf16."""
        if self.cfg.target.dtype == "float32":
            found: nn.Module = self.model.module
            return found
        module = load_model(self.setting.base, torch.float32)
        self.meter.watch(module)
        return module

    @cached_property
    def layouts(self) -> dict[str, UnitLayout]:
        """The target's maskable parameters."""
        mask = self.cfg.mask
        return layouts_for(self.model, mask.granularity, mask.block, mask.maskable)

    @cached_property
    def small(self) -> Small:
        """The proxy, made where it is missing.

        Raises:
            ValueError: the configuration names none.
        """
        if self.cfg.proxy is None:
            raise ValueError(
                "proxy=None: an arm projects from a proxy, and there is none; name one, or leave the arm out"
            )
        path = prepare_base(self.cfg, "proxy")
        module, mask = load_model(path, torch.float32), self.cfg.mask
        self.meter.watch(module)
        layouts = layouts_for(module, mask.granularity, mask.block, mask.maskable)
        return Small(module, layouts, Workbench.load(self.cfg, path, self.study.plain))

    def masks(self, case: Case) -> Path:
        """Folder of a case's masks; other settings have another one."""
        about = abouts(self.cfg, self.study)[case.task]
        return self.cfg.folder.root / "masks" / f"{case.task}-{case.seed}-{about}"

    def prepare_proxy(self) -> None:
        """Make and load the proxy unless it is there."""
        logger.info("proxy: %d parameters", sum(each.numel() for each in self.small.module.parameters()))

    def stream(self, case: Case) -> Stream:
        """The examples of a task that are trained on."""
        return self.parts(case.task)[0]

    def parts(self, task: str, bench: Workbench | None = None) -> tuple[Stream, Stream]:
        """What is trained on, and what is held out to choose rates by: the same for every arm and seed."""
        streams = (bench or self.setting.bench).tasks
        stream = next(each for each in streams if each.task.name == task)
        race = replace(self.cfg.race, heldout=self.study.validation, steps=stream.steps)
        return split(stream, race, self.cfg.seed)

    def batches(self, case: Case, size: int | None = None) -> Batches:
        """A task's batches in the order of a seed, from the first one on."""
        bench, size = self.setting.bench, size or self.cfg.train.batch_size
        return bench.batches([self.stream(case)], size, seed=self.cfg.seed + case.seed)

    def seed(self, case: Case) -> None:
        """Begin a case's random numbers."""
        torch.manual_seed(tensor_seed(self.cfg.seed + case.seed, case.task))

    @contextmanager
    def trained(self, case: Case, mask: Mask, lr: float) -> Iterator[Learner]:
        """Train a mask; the target holds the result inside the block alone.

        Raises:
            NotFinite: training diverges; the target is as before.
        """
        cfg, steps = replace(self.cfg.train.strict(), lr=lr), self.stream(case).steps
        with put_back(self.model, mask):
            _, learner = train_mask(
                self.model,
                mask,
                self.batches(case),
                cfg,
                steps,
                description=f"{case.task} at {lr:g}",
                rate="rate",
            )
            self.model.detach()
            yield learner

    def gradient_sums(self, case: Case, masks: Mapping[str, Mask]) -> dict[str, float]:
        """Sum over each mask's entries of the absolute gradient at the base, of its mean over ``probe.fisher_batches`` batches.

        Args:
            case: the task.
            masks: by any key, of one granularity; one pass serves all.
        """
        union, *others = masks.values()
        for mask in others:
            union = union | mask
        learner = MaskedLearner(self.model, union, self.cfg.train, lr=1.0)
        mean = {name: torch.zeros_like(s.grad) for name, s in self._supports(learner)}
        count, stream = self.cfg.probe.fisher_batches, self.batches(case)
        self.model.train()
        for _ in range(count):
            accumulate(next(stream), learner.forward, learner.backward, self.model.device)
            for name, support in self._supports(learner):
                mean[name].add_(support.grad, alpha=1 / count)
            learner.optimizer.zero_grad()
        self.model.detach()
        return {key: _sum_at(mask, union, mean) for key, mask in masks.items()}

    @staticmethod
    def _supports(learner: MaskedLearner) -> list[tuple[str, Any]]:
        return [(support.name, support) for support in learner.optimizer.supports]

    def validate(self, asked: Asked, task: str) -> HeldOut:
        """Held-out training examples."""
        return self._ask(asked, self.parts(task)[1].encoded.to_list())

    def test(self, asked: Asked, task: str) -> HeldOut:
        """Test examples."""
        return self._ask(asked, self._test_rows(task))

    def text(self, asked: Asked) -> HeldOut:
        """General text."""
        return self._ask(asked, self.texts)

    def base(self) -> Asked:
        """The target as it is."""
        return AsIs(self.model.module, self.model.module.forward)

    @cached_property
    def texts(self) -> list[dict[str, list[int]]]:
        """Passages of general text, or test examples of the general sets."""
        study, bench = self.study, self.setting.bench
        if study.text is not None:
            return passages(find_text(study.text), bench.tokenizer, study.text_tokens, study.num_texts)
        rows: list[dict[str, list[int]]] = []
        for stream in bench.general:
            some = stream.task.test.select(range(min(study.num_texts, len(stream.task.test))))
            rows += encode(some, bench.tokenizer, self.cfg.data).to_list()
        if not rows:
            raise ValueError("study.text=None: there are no general sets either; give a text file")
        return rows

    def _test_rows(self, task: str) -> list[dict[str, list[int]]]:
        found = next(each for each in self.setting.bench.tasks if each.task.name == task)
        rows: list[dict[str, list[int]]] = encode(
            found.task.test, self.setting.bench.tokenizer, self.cfg.data
        ).to_list()
        return rows

    def _ask(self, asked: Asked, rows: Rows) -> HeldOut:
        asked.module.eval()
        return held_out(asked.forward, rows, pad_id(self.setting.bench.tokenizer), EVAL_BATCH)


def _sum_at(mask: Mask, union: Mask, values: Mapping[str, Tensor]) -> float:
    """Sum of absolute values at a mask's entries, of values at those of a union that holds it."""
    total = 0.0
    for name, units in mask.units.items():
        places = torch.searchsorted(union.elements(name), mask.layouts[name].elements(units))
        total += float(values[name].cpu()[places].double().abs().sum())
    return total
