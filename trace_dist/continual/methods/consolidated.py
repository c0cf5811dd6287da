"""``consolidated``: one set of weights, taught by the bank.

Each task's delta on the base answers the prompts of that task, and the base the general ones. After each task the union of the
masks so far is trained from the base on all these answers (distillation, train/soft.py). No label is read. The bank is that of
``retrieved``, with all tasks that earlier runs have left in it, and the prompts are those that it keeps; where it keeps none of a
task of this run, they are those of the task's training examples.

What was said is kept as long as the process lives; a run that was cut asks again, with the same answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import datasets

from trace_dist.bank.bank import BASE
from trace_dist.bank.delta import extract_delta
from trace_dist.bank.prompts import Prompts, PromptSets
from trace_dist.config import RunConfig
from trace_dist.config.checks import Rate, Section, check
from trace_dist.continual.learn import put_back
from trace_dist.continual.methods.one_set import OneSet, held
from trace_dist.continual.prompts import pairs_in, prompts_of
from trace_dist.data.encoding import context_length, pad_id
from trace_dist.data.modality import load_modality
from trace_dist.evaluation.inputs import config_of
from trace_dist.masks.mask import Mask
from trace_dist.masks.ops import union
from trace_dist.profiling.memory_setup import MemorySetup
from trace_dist.run_folder import PROMPTS
from trace_dist.train.learner import Learner
from trace_dist.train.loop import TrainResult
from trace_dist.train.soft import SoftBatches, SoftLearner
from trace_dist.train.task import train_learner
from trace_dist.train.teacher import answer, teach
from trace_dist.train.workbench import Stream
from trace_dist.utils.log import get_logger
from trace_dist.utils.together import on_all, on_main

logger = get_logger(__name__)


@dataclass(frozen=True)
class Options(Section):
    """Of ``consolidated``."""

    section: ClassVar[str] = "continual.options.consolidated"

    prompts: int | None = None
    """Prompts of each task, and of each general set, that the teachers answer; when not set, all that the bank keeps
    (`bank.keep_prompts`)."""
    general: float = 0.25
    """Share of each batch that the base teaches on general prompts, in [0, 1); 0 where there are no general tasks."""
    top: int = 16
    """Tokens whose probabilities are kept for each answer token; the others count as one."""
    steps: int | None = None
    """Optimizer steps after each task; when not set, as many as the tasks so far have together, and the general share on top."""
    lr: Rate | None = None
    """Peak learning rate, or `auto`; as `train.lr` when not set."""

    def check(self) -> None:
        share = self.general
        check(0 <= share < 1, f"{self.where}.general", share, "must lie in [0, 1)", "use for example 0.25")
        self.rates("lr")
        self.at_least(1, "prompts", "top", "steps")


@dataclass(frozen=True)
class Said:
    """What the teachers said (``train.teacher.teach``).

    Attributes:
        tasks: task -> what its delta said.
        general: what the base said, to each general set.
    """

    tasks: dict[str, datasets.Dataset]
    general: list[datasets.Dataset]


class Consolidated(OneSet):
    """One set of weights that knows what the bank knows."""

    label = "consolidated"
    colour = "green"
    teaches = True

    @classmethod
    def num_steps(cls, options: Any, cfg: RunConfig, steps: Sequence[int]) -> int:
        share = options.general if cfg.general else 0.0
        return int(options.steps or round(sum(steps) / (1 - share)))

    @classmethod
    def memory_setup(cls, cfg: RunConfig, setup: MemorySetup) -> MemorySetup:
        # The union of the tasks' masks, which have nothing in common at worst.
        return replace(setup, density=min(1.0, len(cfg.tasks) * setup.density))

    @classmethod
    def check(cls, name: str, cfg: RunConfig) -> None:
        super().check(name, cfg)
        if not load_modality(cfg.data.modality).keeps_prompts:
            raise ValueError(
                f"continual.methods={name!r}: asks teachers for texts, and data.modality is {cfg.data.modality!r}; "
                "remove the method"
            )
        if not on_main(lambda: cfg.folder.method(name).is_file()):
            own = {task.name for task in cfg.tasks}
            for record in held(cfg):
                if record.name not in {BASE, *own} and PROMPTS not in record.files:
                    raise _unasked(record.name, cfg.bank_of().root)

    def folded(self, stream: Stream) -> list[str]:
        """The tasks that are known after a task: those that other runs have left in the bank, and this run's up to that one."""
        bench = self.setting.bench
        own = {each.task.name for each in bench.tasks}
        others = [name for name in self.bank.tasks if name not in {BASE, *own}]
        return [*others, *(each.task.name for each in bench.upto(stream))]

    def made_of(self) -> dict[str, Any]:
        return self.deltas(self.folded(self.setting.bench.tasks[-1]))

    def learn(self, stream: Stream) -> TrainResult:
        said, mask = self._said, self._mask(stream)
        model, cfg, batches = self.setting.model, self.setting.cfg.train, self._batches(stream, said)
        if cfg.eval_every:
            logger.info("%s: reads no labels, so it looks at no validation examples", self.name)
        with self.setting.training(self.name, stream.task.name) as options, put_back(model, mask):
            learner = SoftLearner(model, mask, cfg, self.lr)
            steps = self._steps(stream)
            result = train_learner(learner, batches, cfg, steps, rate=self.lr_field, **options)
            model.detach()
            self.delta = extract_delta(model, mask, self.name)
        return result

    @contextmanager
    def trial(self, stream: Stream, part: Stream, lr: float) -> Iterator[Learner]:
        said, mask, task = self._said, self._mask(stream), stream.task.name
        model, cfg = self.setting.model, self.setting.cfg.train.strict()
        # Nothing that was said of the examples held out.
        known = set(_asked(part.encoded))
        rows = [row for row, prompt in enumerate(_asked(said.tasks[task])) if prompt in known]
        part_said = replace(said, tasks=said.tasks | {task: said.tasks[task].select(rows)})
        batches = self._batches(stream, part_said)
        with put_back(model, mask):
            learner = SoftLearner(model, mask, cfg, lr)
            train_learner(
                learner,
                batches,
                cfg,
                part.steps,
                horizon=self._steps(stream),
                description=f"{self.name} at {lr:g}",
                rate="race.grid",
            )
            model.detach()
            yield learner

    def _mask(self, stream: Stream) -> Mask:
        """The union of the masks of the tasks that are folded."""
        bank, names = self.bank, self.folded(stream)
        return on_all(lambda: union([bank.mask(name) for name in names]))

    def _steps(self, stream: Stream) -> int:
        return self.options.steps or round(sum(self._trained(stream).values()) / (1 - self._general_share))

    def _trained(self, stream: Stream) -> dict[str, int]:
        """Steps that each task that is folded was trained for."""
        own = {each.task.name: each.steps for each in self.setting.bench.tasks}
        usual = self.setting.cfg.train.steps
        return {
            name: own.get(name) or self.bank.facts(name).get("training", {}).get("steps", usual)
            for name in self.folded(stream)
        }

    @property
    def _general_share(self) -> float:
        share: float = self.options.general
        return share if share and self._general_prompts else 0.0

    def _batches(self, stream: Stream, said: Said) -> SoftBatches:
        """Tasks are drawn as often as they were trained, the general sets equally often."""
        cfg, share, trained = self.setting.cfg, self._general_share, self._trained(stream)
        total, newest = sum(trained.values()), stream.task.name
        replay = [
            (said.tasks[name], (1 - share) * steps / total)
            for name, steps in trained.items()
            if name != newest
        ]
        if share:
            replay += [(each, share / len(said.general)) for each in said.general]
        return SoftBatches(
            said.tasks[newest],
            batch_size=cfg.train.batch_size,
            micro_batch_size=cfg.train.micro_batch_size,
            seed=cfg.seed,
            pad_id=pad_id(self.setting.bench.tokenizer),
            replay=replay,
            replay_share=sum(weight for _, weight in replay),
            packing=cfg.data.packing,
        )

    @cached_property
    def _said(self) -> Said:
        """What the teachers say: the base, and each task's delta on it. The model holds the base. Collective."""
        model, last = self.setting.model, self.setting.bench.tasks[-1]
        general, tasks = [], {}
        if self._general_share:
            general = [self._taught(self._wanted(prompts)) for prompts in self._general_prompts.values()]
        for name in self.folded(last):
            prompts = self._prompts(name)
            with self.bank.activated(model, name):
                tasks[name] = self._taught(prompts)
        return Said(tasks, general)

    @cached_property
    def _general_prompts(self) -> PromptSets:
        """Prompts of the base: those that the bank keeps, or of this run's general sets. Collective."""
        kept = on_all(lambda: self.bank.prompts(BASE)) if BASE in self.bank.tasks else None
        if kept is not None:
            return kept
        return {each.task.name: prompts_of(self.setting, each, None) for each in self.setting.bench.general}

    def _prompts(self, task: str) -> Prompts:
        """Prompts of a task: those that the bank keeps, or of this run's examples. Collective.

        Raises:
            ValueError: there are neither.
        """
        kept = on_all(lambda: self.bank.prompts(task))
        if kept is not None:
            return self._wanted(next(iter(kept.values())))
        for stream in self.setting.bench.tasks:
            if stream.task.name == task:
                return self._wanted(prompts_of(self.setting, stream, None))
        raise _unasked(task, self.bank.folder)

    def _wanted(self, prompts: Prompts) -> Prompts:
        return Prompts(prompts.pairs[: self.options.prompts], prompts.max_new_tokens)

    def _taught(self, prompts: Prompts) -> datasets.Dataset:
        """What the model as it is says to some prompts."""
        module, tokenizer = self.setting.model.module, self.setting.bench.tokenizer
        batch_size = self.setting.cfg.eval.batch_size
        pairs, cap = prompts.pairs, prompts.max_new_tokens
        # Running text is its own answer.
        if cap is not None:
            context = context_length(config_of(module))
            # Prompts and answers were checked together, row by row.
            if context is not None:
                cap = min(cap, context - max(len(pair.prompt) for pair in pairs))
            texts = [pair.prompt for pair in pairs]
            pairs = answer(module, tokenizer, texts, batch_size=batch_size, max_new_tokens=cap)
        return teach(module, pairs, top=self.options.top, batch_size=batch_size, pad_id=pad_id(tokenizer))

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "prompts": {task: len(rows) for task, rows in self._said.tasks.items()}}


def _unasked(task: str, bank: Path) -> ValueError:
    """Of a task that no teacher can be asked for."""
    return ValueError(
        f"task={task!r}: the bank {bank} keeps no prompts of it to teach with, and it is none of this run's tasks; add its "
        "examples to the tasks of the configuration, learn it again with bank.keep_prompts, or leave consolidated out"
    )


def _asked(encoded: datasets.Dataset) -> list[tuple[int, ...]]:
    """Token ids of the examples' prompts."""
    return [tuple(pair.prompt) for pair in pairs_in(encoded)]


METHOD = Consolidated
