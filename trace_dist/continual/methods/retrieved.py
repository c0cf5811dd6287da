"""``retrieved``: a delta per task in a bank; every input is answered with the delta that its representation retrieves.

Each task is trained from the base on its own mask, kept as a delta, and the base is put back. Nothing is forgotten where
retrieval is right. The state between tasks is the bank itself, and the scores of what it has answered.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from trace_dist.bank.bank import BASE, DeltaBank
from trace_dist.bank.learned_on import warn_of_others
from trace_dist.config.checks import Rate, Section
from trace_dist.continual.judge import Row
from trace_dist.continual.layer import bank_view
from trace_dist.continual.learn import learn_task, try_rate
from trace_dist.continual.methods.base import Method
from trace_dist.continual.prompts import to_keep
from trace_dist.continual.scored import Scored
from trace_dist.continual.setting import Setting
from trace_dist.masks.mask import Mask
from trace_dist.train.learner import Learner
from trace_dist.train.loop import TrainResult
from trace_dist.train.workbench import Stream
from trace_dist.utils.files import read_json, write_json
from trace_dist.utils.together import on_main


@dataclass(frozen=True)
class Options(Section):
    """Of ``retrieved``."""

    section: ClassVar[str] = "continual.options.retrieved"

    lr: Rate | None = None
    """Peak learning rate, or `auto`; as `train.lr` when not set."""

    def check(self) -> None:
        self.rates("lr")


class Retrieved(Method):
    """A bank of deltas, retrieved at test time."""

    label = "retrieved"
    colour = "blue"
    keeps_answers = True
    masked = True
    on_ranks = True
    masks: ClassVar[str] = "projected"
    """Kind of masks that are trained."""

    def __init__(self, name: str, setting: Setting, options: Options) -> None:
        super().__init__(name, setting, options)
        self._scored = Scored()
        self._sizes: dict[str, dict[str, Any]] = {}  # of each task learned: delta_bytes, entries, density

    @cached_property
    def bank(self) -> DeltaBank:
        """The bank, with a signature of the general sets where it is new."""
        setting = self.setting
        folder = setting.cfg.bank_of(self.name)
        view = bank_view(setting.judge, setting.model, folder)
        bank = DeltaBank.create(folder.root, setting.fingerprint, *view)
        warn_of_others(bank, setting.model.quantize)
        bank.check_kind(setting.cfg.bank.signature)
        bank.check_dtype(setting.cfg.target.dtype)
        if setting.cfg.bank.representation == "adapted":
            bank.check_adapted()
        if setting.bench.general and not bank.tasks:
            signature = setting.judge.signature(setting.model, setting.bench.general, BASE, *view)
            bank.add(signature, None, prompts=to_keep(setting, setting.bench.general))
        return bank

    def mask(self, stream: Stream) -> Mask:
        """A task's mask. Collective."""
        return self.setting.mask_for(stream, self.masks)

    def learn(self, stream: Stream) -> TrainResult:
        mask = self.mask(stream)
        result = learn_task(self.setting, self.bank, stream, mask, name=self.name, lr=self.own_lr)
        delta = self.bank.own_delta(stream.task.name)
        if delta is None:
            raise AssertionError(f"{stream.task.name}: was learned, but the bank holds no delta of it")
        self._sizes[stream.task.name] = {
            "delta_bytes": delta.nbytes,
            "entries": mask.num_entries,
            "density": mask.density,
        }
        return result

    def trial(self, stream: Stream, part: Stream, lr: float) -> AbstractContextManager[Learner]:
        return try_rate(self.setting, self.mask(stream), stream, part, lr, name=self.name)

    def score(self) -> Row:
        if not self._sizes:
            return self.setting.base_row
        return self.setting.judge.score_retrieved(self.setting.model, self.bank, self._scored)

    def facts(self) -> dict[str, Any]:
        sizes = list(self._sizes.values())
        entries = sum(size["entries"] for size in sizes)
        begun = {task: self.bank.facts(task).get("training", {}).get("composition") for task in self._sizes}
        return {
            **({"composition": begun} if any(begun.values()) else {}),
            "density": sum(size["density"] for size in sizes) / len(sizes),
            "trainable": entries // len(sizes),
            "delta_bytes": {task: size["delta_bytes"] for task, size in self._sizes.items()},
            "bytes_per_entry": sum(size["delta_bytes"] for size in sizes) / entries,
            "retrieval": self.setting.judge.retrieval(self.setting.model, self.bank, self._scored),
        }

    def state(self, folder: Path) -> None:
        value = {"scored": self._scored.to_json(), "sizes": self._sizes}
        on_main(lambda: write_json(folder / "bank.json", value))

    def load_state(self, folder: Path) -> None:
        found = read_json(folder / "bank.json")
        self._scored, self._sizes = Scored.from_json(found["scored"]), found["sizes"]


METHOD = Retrieved
