"""What methods have in common that train nothing: they add up the frozen base's representations by answer, and answer from sums.

Each answer of a training example is a class, so they suit tasks with few different answers, such as the classes of images.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trace_dist.config import RunConfig
from trace_dist.config.checks import AUTO, check
from trace_dist.continual.judge import Row
from trace_dist.continual.methods.base import Method
from trace_dist.data.tasks import Task
from trace_dist.train.loop import TrainResult
from trace_dist.train.workbench import Stream
from trace_dist.utils.files import load_tensors, read_json, save_tensors, write_json
from trace_dist.utils.together import on_main


class Frozen(Method):
    """A classifier over representations, made of sums: nothing of earlier tasks changes when one is added."""

    masked = False
    on_ranks = True
    trains = False

    def __init__(self, name: str, setting: Any, options: Any) -> None:
        super().__init__(name, setting, options)
        self.classes: list[str] = []
        """Answers so far, in the order in which they came."""
        self.sums: dict[str, Tensor] = {}
        """What is kept of all examples so far."""

    @classmethod
    def check(cls, name: str, cfg: RunConfig) -> None:
        rule, cure = f"{name} has no bank that it is chosen for", "name one, or remove the method"
        check(cfg.bank.layer != AUTO, "bank.layer", cfg.bank.layer, rule, cure)
        check(cfg.bank.pooling != AUTO, "bank.pooling", cfg.bank.pooling, rule, cure)

    @abstractmethod
    def add(self, x: Tensor, labels: Tensor) -> None:
        """Take the examples of a task.

        Args:
            x: [N, D] fp32 representations.
            labels: [N] int64, indices into ``classes``.
        """

    @abstractmethod
    def scores(self, x: Tensor) -> Tensor:
        """[N, classes] of representations [N, D]; the highest wins."""

    def learn(self, stream: Stream) -> TrainResult:
        setting, rows = self.setting, stream.task.train
        x = setting.judge.represent(setting.model, rows["prompt"][:], *setting.cfg.bank.view)
        answers = rows["answer"][:]
        self.classes += [answer for answer in stream.task.answers if answer not in self.classes]
        self.add(x, torch.tensor([self.classes.index(answer) for answer in answers]))
        return TrainResult()

    def score(self) -> Row:
        if not self.classes:
            return self.setting.base_row
        return self.setting.judge.score_answers(self.setting.model.module, self._answers)

    def _answers(self, task: Task) -> list[str]:
        setting = self.setting
        x = setting.judge.representations(setting.model, task, *setting.cfg.bank.view)
        return on_main(lambda: [self.classes[best] for best in self.scores(x).argmax(dim=1).tolist()])

    def facts(self) -> dict[str, Any]:
        return {"kept_bytes": sum(value.nbytes for value in self.sums.values())}

    def state(self, folder: Path) -> None:
        def write() -> None:
            write_json(folder / "classes.json", self.classes)
            save_tensors(folder / "sums.safetensors", self.sums, {"format": "trace_dist.weights"})

        on_main(write)

    def load_state(self, folder: Path) -> None:
        found: Mapping[str, Tensor]
        found, _ = load_tensors(folder / "sums.safetensors", "weights")
        self.classes, self.sums = read_json(folder / "classes.json"), dict(found)
