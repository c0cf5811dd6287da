"""``merged``: one set of weights; every task continues from the last on its own mask, and a share of each batch is replayed.

The state between tasks is a delta against the base: the present values on the union of the tasks' masks.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from trace_dist.bank.delta import Delta, Snapshot, applied, extract_delta
from trace_dist.continual.isolation.base import Change
from trace_dist.continual.judge import Row
from trace_dist.continual.learn import train_stream, try_mask
from trace_dist.continual.methods.base import Method
from trace_dist.continual.methods.options import Replayed, replaying
from trace_dist.continual.setting import Setting
from trace_dist.masks.mask import Mask
from trace_dist.train.learner import Learner
from trace_dist.train.loop import TrainResult
from trace_dist.train.workbench import Stream
from trace_dist.utils.files import read_json, write_json
from trace_dist.utils.together import on_main


@dataclass(frozen=True)
class Options(Replayed):
    """Of ``merged``."""

    section: ClassVar[str] = "continual.options.merged"

    replay: float = 0.1
    """Share of each batch that is drawn from earlier tasks and the general tasks, in [0, 1)."""


class Merged(Method):
    """One set of weights for all tasks. The shared model holds it until ``close`` puts the base back."""

    label = "merged"
    colour = "sky"
    masked = True
    on_ranks = True
    continues = True

    def __init__(self, name: str, setting: Setting, options: Options) -> None:
        super().__init__(name, setting, options)
        self._undo = ExitStack()
        self._union: Mask | None = None  # of the masks so far; not None iff a task was learned
        self._changes: list[Change] = []  # of the tasks so far, where the isolation reads them
        self._sizes: list[dict[str, Any]] = []  # of each task's mask: entries, density

    def learn(self, stream: Stream) -> TrainResult:
        setting = self.setting
        if self._union is None:
            self._project()
        mask = setting.mask_for(stream)
        self._undo.callback(Snapshot(setting.model, mask).restore)
        isolation, task = setting.isolation, stream.task.name
        before = extract_delta(setting.model, mask, task) if isolation.reads_changes else None
        scale = isolation.scale(mask, self._changes)
        batches = replaying(setting, stream, self.options)
        result = train_stream(setting, stream, mask, batches, name=self.name, lr=self.own_lr, scale=scale)
        if before is not None:
            self._changes.append(Change.between(before, extract_delta(setting.model, mask, task)))
        self._union = mask if self._union is None else self._union | mask
        self._sizes.append({"entries": mask.num_entries, "density": mask.density})
        return result

    def trial(self, stream: Stream, part: Stream, lr: float) -> AbstractContextManager[Learner]:
        self._project()
        mask = self.setting.mask_for(stream)
        batches = replaying(self.setting, part, self.options)
        return try_mask(self.setting, mask, batches, lr, part.steps, horizon=stream.steps, name=self.name)

    def _project(self) -> None:
        """Masks are projected onto the base, which the model holds only now."""
        for stream in self.setting.bench.tasks:
            self.setting.mask_for(stream)

    def score(self) -> Row:
        if self._union is None:
            return self.setting.base_row
        return self.setting.judge.score(self.setting.model.module)

    def facts(self) -> dict[str, Any]:
        count = len(self._sizes)
        return {
            "density": sum(size["density"] for size in self._sizes) / count,
            "trainable": sum(size["entries"] for size in self._sizes) // count,
            "replay": self.options.replay,
            "replay_memory": self.options.replay_memory,
        }

    def product(self) -> Delta:
        if self._union is None:
            raise AssertionError(f"{self.name}: nothing is known before the first task")
        return extract_delta(self.setting.model, self._union, self.name)

    def state(self, folder: Path) -> None:
        delta = self.product()
        on_main(lambda: delta.save(folder / "delta.safetensors"))
        on_main(lambda: self._save_changes(folder))
        on_main(lambda: write_json(folder / "sizes.json", self._sizes))

    def _save_changes(self, folder: Path) -> None:
        for number, change in enumerate(self._changes):
            kept = Delta(change.mask, change.values, change.task)
            kept.save(folder / f"change-{number:05d}.safetensors")

    def load_state(self, folder: Path) -> None:
        self._project()
        delta = Delta.load(folder / "delta.safetensors")
        self._union, self._sizes = delta.mask, read_json(folder / "sizes.json")
        kept = [Delta.load(path) for path in sorted(folder.glob("change-*.safetensors"))]
        self._changes = [Change(each.task, each.mask, each.values) for each in kept]
        self._undo.enter_context(applied(self.setting.model, delta))

    def close(self) -> None:
        self._undo.close()


METHOD = Merged
