"""``lora_retrieved``: LoRA adapters per task on the frozen base; every input is answered with those that its representation
retrieves.

What the field does with adapters, given the same retrieval as ``retrieved`` (bank/retrieval.py, after PROTEUS, arXiv 2603.13235):
the two differ in what is trained, and not in how it is found. LoRA: arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from trace_dist.bank.bank import BASE
from trace_dist.bank.retrieval import Retriever
from trace_dist.bank.signature import Signature
from trace_dist.config import RunConfig
from trace_dist.config.checks import AUTO, check
from trace_dist.continual.judge import Judge, Row
from trace_dist.continual.methods.lora import LoRA
from trace_dist.continual.methods.options import LowRank
from trace_dist.continual.scored import Scored
from trace_dist.continual.setting import Setting
from trace_dist.train.loop import TrainResult
from trace_dist.train.loss import autocast
from trace_dist.train.workbench import Stream
from trace_dist.utils.files import load_tensors, read_json, save_tensors, write_json


@dataclass(frozen=True)
class Options(LowRank):
    """Of ``lora_retrieved``."""

    section: ClassVar[str] = "continual.options.lora_retrieved"


class Adapters:
    """A bank of adapters, asked as a bank of deltas is: between calls the model answers as the base does.

    Args:
        lora: the model, whose adapters add nothing.
    """

    def __init__(self, lora: LoRA) -> None:
        self.module = lora.module.get_base_model()
        self.layer, self.pooling = lora.setting.cfg.bank.view
        self.retriever = Retriever()
        self.values: dict[str, dict[str, Tensor]] = {}
        """Task -> adapters by name, in host memory: a GPU would fill with tasks."""
        self._lora = lora

    @property
    def tasks(self) -> list[str]:
        """Names of the signatures in order, ``base`` among them if it has one."""
        return self.retriever.tasks

    def eval(self) -> Adapters:
        """Of the model."""
        self.module.eval()
        return self

    def retrieve(self, representations: Tensor, reject: float | None = None) -> list[str]:
        """The task of each prompt."""
        return self.retriever.retrieve(representations, reject)

    @contextmanager
    def activated(self, model: Any, task: str) -> Iterator[None]:
        """Inside the block the model is the task's."""
        if task != BASE:
            self._lora.put(self.values[task])
        try:
            yield
        finally:
            self._lora.renew()


class LoRARetrieved(LoRA):
    """Adapters per task, retrieved at test time."""

    label = "LoRA per task, retrieved"
    keeps_answers = True
    continues = False

    @classmethod
    def check(cls, name: str, cfg: RunConfig) -> None:
        super().check(name, cfg)
        bank, rule = cfg.bank, f"continual.methods={name!r} has no bank of deltas, in which this is kept"
        check(bank.layer != AUTO, "bank.layer", bank.layer, rule, "give a number")
        check(bank.pooling != AUTO, "bank.pooling", bank.pooling, rule, "name one")
        own = bank.representation != "base"
        check(not own, "bank.representation", bank.representation, rule, "use base, or remove the method")

    def __init__(self, name: str, setting: Setting, options: Options) -> None:
        super().__init__(name, setting, options)
        # of its own: representations are those of this model
        self._judge = Judge(setting.cfg, setting.bench)
        self._scored = Scored()

    @cached_property
    def bank(self) -> Adapters:
        """The adapters so far, with a signature of the general sets."""
        bank = Adapters(self)
        if self.setting.bench.general:
            bank.retriever.add(self._signature(bank, self.setting.bench.general, BASE))
        return bank

    def _signature(self, bank: Adapters, streams: list[Stream], name: str) -> Signature:
        with autocast(self.setting.cfg.target.dtype):
            return self._judge.signature(bank, streams, name, bank.layer, bank.pooling)

    def begin(self, stream: Stream) -> None:
        self.renew()

    def learn(self, stream: Stream) -> TrainResult:
        bank, task = self.bank, stream.task.name
        signature = self._signature(bank, [stream], task)
        result = super().learn(stream)
        bank.values[task] = {
            name: value.detach().to("cpu", copy=True) for name, value in self.trained().items()
        }
        bank.retriever.add(signature)
        self.renew()
        return result

    def score(self) -> Row:
        with autocast(self.setting.cfg.target.dtype):
            return self._judge.score_retrieved(self.bank, self.bank, self._scored)

    def facts(self) -> dict[str, Any]:
        with autocast(self.setting.cfg.target.dtype):
            retrieval = self._judge.retrieval(self.bank, self.bank, self._scored)
            return {**super().facts(), "retrieval": retrieval}

    def state(self, folder: Path) -> None:
        value = {"scored": self._scored.to_json(), "tasks": list(self.bank.values)}
        write_json(folder / "bank.json", value)
        for number, adapters in enumerate(self.bank.values.values()):
            save_tensors(
                folder / f"adapters-{number:05d}.safetensors", adapters, {"format": "trace_dist.weights"}
            )
        for number, signature in enumerate(self.bank.retriever.signatures):
            signature.save(folder / f"signature-{number:05d}.safetensors")

    def load_state(self, folder: Path) -> None:
        found = read_json(folder / "bank.json")
        bank = Adapters(self)
        for path in sorted(folder.glob("signature-*.safetensors")):
            bank.retriever.add(Signature.load(path))
        for number, task in enumerate(found["tasks"]):
            bank.values[task], _ = load_tensors(folder / f"adapters-{number:05d}.safetensors", "weights")
        self.bank, self._scored = bank, Scored.from_json(found["scored"])


METHOD = LoRARetrieved
