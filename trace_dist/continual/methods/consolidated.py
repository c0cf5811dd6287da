"""``consolidated``: one set of weights, taught by the bank.

Each task's delta on the base answers the prompts of that task, and the base the general ones. After each task the union of the
masks so far is trained from the base on all these answers (distillation, train/soft.py). No label is read: the prompts are those
of the training examples. The bank is that of ``retrieved``.

What was said is kept as long as the process lives; a run that was cut asks again, with the same answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any, ClassVar

import datasets

from trace_dist.bank.bank import BASE
from trace_dist.bank.delta import extract_delta
from trace_dist.config.checks import Rate, Section, check
from trace_dist.continual.learn import put_back
from trace_dist.continual.methods.one_set import OneSet
from trace_dist.continual.setting import Setting
from trace_dist.data.encoding import context_length, last_pair, pad_id
from trace_dist.evaluation.inputs import config_of
from trace_dist.masks.mask import Mask
from trace_dist.train.learner import Learner
from trace_dist.train.loop import TrainResult
from trace_dist.train.soft import SoftBatches, SoftLearner
from trace_dist.train.task import train_learner
from trace_dist.train.teacher import answer, teach
from trace_dist.train.workbench import Stream
from trace_dist.utils.together import on_all


@dataclass(frozen=True)
class Options(Section):
    """Of ``consolidated``."""

    section: ClassVar[str] = "continual.options.consolidated"

    prompts: int = 1000
    """Prompts of each task, and of each general set, that the teachers answer; those of the first training examples."""
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


Said = dict[str, datasets.Dataset]
"""Name of a task or general set -> what its teacher said (``train.teacher.teach``)."""


class Consolidated(OneSet):
    """One set of weights that knows what the bank knows."""

    label = "consolidated"
    colour = "green"

    def __init__(self, name: str, setting: Setting, options: Options) -> None:
        super().__init__(name, setting, options)
        self._said: Said = {}

    def learn(self, stream: Stream) -> TrainResult:
        self._ask()
        model, cfg, mask = self.setting.model, self.setting.cfg.train, self._mask(stream)
        batches, steps = self._batches(stream, self._said), self._steps(stream)
        with self.setting.training(self.name, stream.task.name) as options, put_back(model, mask):
            learner = SoftLearner(model, mask, cfg, self.lr)
            result = train_learner(learner, batches, cfg, steps, rate=self.lr_field, **options)
            model.detach()
            self.delta = extract_delta(model, mask, self.name)
        return result

    @contextmanager
    def trial(self, stream: Stream, part: Stream, lr: float) -> Iterator[Learner]:
        self._ask()
        model, cfg, mask, task = (
            self.setting.model,
            self.setting.cfg.train,
            self._mask(stream),
            stream.task.name,
        )
        # Nothing that was said of the examples held out.
        known = set(_prompts(part.encoded))
        rows = [row for row, prompt in enumerate(_prompts(self._said[task])) if prompt in known]
        batches = self._batches(stream, self._said | {task: self._said[task].select(rows)})
        with put_back(model, mask):
            learner = SoftLearner(model, mask, cfg, lr)
            description = f"{self.name} at {lr:g}"
            train_learner(learner, batches, cfg, part.steps, description=description, rate="race.grid")
            model.detach()
            yield learner

    def _steps(self, stream: Stream) -> int:
        own = sum(each.steps for each in self.upto(stream))
        return self.options.steps or round(own / (1 - self._general_share))

    @property
    def _general_share(self) -> float:
        return self.options.general if self.setting.bench.general else 0.0

    def _mask(self, stream: Stream) -> Mask:
        """The union of the masks up to a task's."""
        bank, names = self.bank, [each.task.name for each in self.upto(stream)]
        return reduce(or_, on_all(lambda: [bank.mask(name) for name in names]))

    def _batches(self, stream: Stream, said: Said) -> SoftBatches:
        """Tasks are drawn as often as they have steps, the general sets equally often."""
        cfg, bench, share = self.setting.cfg, self.setting.bench, self._general_share
        tasks, general = self.upto(stream), bench.general if share else []
        total = sum(each.steps for each in tasks)
        weights = {each.task.name: (1 - share) * each.steps / total for each in tasks}
        weights |= {each.task.name: share / len(general) for each in general}
        others = {name: weight for name, weight in weights.items() if name != stream.task.name}
        return SoftBatches(
            said[stream.task.name],
            batch_size=cfg.train.batch_size,
            micro_batch_size=cfg.train.micro_batch_size,
            seed=cfg.seed,
            pad_id=pad_id(bench.tokenizer),
            replay=[(said[name], weight) for name, weight in others.items()],
            replay_share=sum(others.values()),
        )

    def _ask(self) -> None:
        """Ask the teachers, once: the base, and each task's delta on it. The model holds the base. Collective."""
        if self._said:
            return
        bench, said = self.setting.bench, {}
        general = bench.general if self._general_share else []
        for teacher, stream in (
            *((BASE, each) for each in general),
            *((each.task.name, each) for each in bench.tasks),
        ):
            with self.bank.activated(self.setting.model, teacher):
                said[stream.task.name] = self._taught(stream)
        self._said = said

    def _taught(self, stream: Stream) -> datasets.Dataset:
        """What the model as it is says to a task's prompts."""
        setting, bench = self.setting, self.setting.bench
        rows = stream.encoded.select(range(min(self.options.prompts, len(stream.encoded)))).to_list()
        pairs = [last_pair(row["input_ids"], row["labels"]) for row in rows]
        # Running text is its own answer.
        if stream.task.metric != "bits_per_byte":
            cap = setting.cfg.eval.max_new_tokens or 1 + max(len(pair.answer) for pair in pairs)
            context = context_length(config_of(setting.model.module))
            if context is not None:  # prompts and answers were checked together, row by row
                cap = min(cap, context - max(len(pair.prompt) for pair in pairs))
            pairs = answer(
                setting.model.module,
                bench.tokenizer,
                [pair.prompt for pair in pairs],
                batch_size=setting.cfg.eval.batch_size,
                max_new_tokens=cap,
            )
        return teach(
            setting.model.module,
            pairs,
            top=self.options.top,
            batch_size=setting.cfg.eval.batch_size,
            pad_id=pad_id(bench.tokenizer),
        )

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "prompts": self.options.prompts}


def _prompts(encoded: datasets.Dataset) -> list[tuple[int, ...]]:
    """Token ids of the examples' prompts."""
    columns = encoded["input_ids"][:], encoded["labels"][:]
    return [tuple(last_pair(ids, labels).prompt) for ids, labels in zip(*columns, strict=True)]


METHOD = Consolidated
