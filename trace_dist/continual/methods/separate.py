"""``separate``: a full model for each task, fine-tuned from the base, and every input goes to that of its own task: the task is
given, not retrieved. What a method that keeps tasks apart can reach at most: a bound.

A model never changes, and neither does its score, which is what is kept: not the models, of which there is one at a time. General
prompts belong to no task and go to the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from trace_dist.continual.judge import Row
from trace_dist.continual.methods.full import Full
from trace_dist.continual.methods.options import Rated
from trace_dist.continual.setting import Setting
from trace_dist.train.loop import TrainResult
from trace_dist.train.loss import autocast
from trace_dist.train.workbench import Stream
from trace_dist.utils.files import read_json, write_json


@dataclass(frozen=True)
class Options(Rated):
    """Of ``separate``."""

    section: ClassVar[str] = "continual.options.separate"


class Separate(Full):
    """A model per task."""

    label = "a model per task (bound)"
    colour = "amber"
    keeps_answers = True
    continues = False

    def __init__(self, name: str, setting: Setting, options: Options) -> None:
        super().__init__(name, setting, options)
        self._base: Row | None = None  # scores of the base; None until they are taken
        self._scores: dict[str, float] = {}  # of each task learned, by its own model
        self._per_example: dict[str, list[float]] = {}  # of its test examples

    def learn(self, stream: Stream) -> TrainResult:
        result = super().learn(stream)
        # as that of retrieved weights, which have learned the answers of one task alone, too
        asked = replace(stream.task, among=stream.task.answers)
        with autocast(self.setting.cfg.target.dtype):
            score = self.setting.judge.evaluate(self.module, asked)
        self._scores[stream.task.name] = score.value
        self._per_example[stream.task.name] = score.per_example
        return result

    @property
    def base(self) -> Row:
        """Scores of the base, taken once."""
        if self._base is None:
            # a run that was cut may have trained its first task by now
            self.drop()
            self._base = super().score()
        return self._base

    def score(self) -> Row:
        names = [stream.task.name for stream in self.setting.bench.tasks]
        tasks = [self._scores.get(name, score) for name, score in zip(names, self.base.tasks, strict=True)]
        return replace(self.base, tasks=tasks, per_example={**self.base.per_example, **self._per_example})

    def kept(self) -> dict[str, Tensor]:
        # the next task begins from the base
        return {}

    def restore(self, kept: Mapping[str, Tensor]) -> None:
        self.drop()

    def state(self, folder: Path) -> None:
        kept = {"base": asdict(self.base), "tasks": self._scores, "per_example": self._per_example}
        write_json(folder / "scores.json", kept)

    def load_state(self, folder: Path) -> None:
        found: dict[str, Any] = read_json(folder / "scores.json")
        self._base, self._scores = Row(**found["base"]), found["tasks"]
        self._per_example = found.get("per_example", {})


METHOD = Separate
