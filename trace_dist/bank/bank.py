"""The delta bank: a folder with one delta per task and the signatures that retrieve them.

    bank/bank.json                     format, fingerprint of the base model, layer of the representations
    bank/deltas/<task>.safetensors     tuned values (bank.delta)
    bank/signatures.safetensors        clusters of prompt representations under the frozen base (bank.signature)

A signature without a delta stands for the base model itself: inputs that resemble it are answered without any delta.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from trace_dist.bank.delta import Delta, applied, check_base, extract_delta
from trace_dist.bank.retrieval import Retriever
from trace_dist.bank.signature import Signature, load_signatures, save_signatures
from trace_dist.masks.ops import combine
from trace_dist.sharding.base import ShardedModel
from trace_dist.utils import dist
from trace_dist.utils.files import read_json, write_json

VERSION = 1
BASE = "base"
"""Name of the signature that stands for the base model."""


class DeltaBank:
    """Deltas of one base model. Create a new one with ``create``, open one with the constructor.

    Args:
        folder: the bank's folder.

    Raises:
        ValueError: the folder holds no bank, or the bank is damaged.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        about = read_json(self.folder / "bank.json")
        if about.get("format") != "trace_dist.bank" or about.get("version") != VERSION:
            raise ValueError(f"{self.folder}: not a version {VERSION} bank; give the folder of a bank")
        self.base: str = about["base"]
        self.layer: int = about["layer"]
        path = self.folder / "signatures.safetensors"
        self.retriever = Retriever(load_signatures(path)[0] if path.is_file() else ())

    @classmethod
    def create(cls, folder: Path | str, base: str, layer: int) -> DeltaBank:
        """Start an empty bank. Collective.

        Args:
            folder: where; an existing bank there is emptied.
            base: fingerprint of the base model.
            layer: hidden layer that representations are taken from.
        """
        folder = Path(folder)
        if dist.is_main():
            (folder / "signatures.safetensors").unlink(missing_ok=True)
            shutil.rmtree(folder / "deltas", ignore_errors=True)
            write_json(
                folder / "bank.json",
                {"format": "trace_dist.bank", "version": VERSION, "base": base, "layer": layer},
            )
        dist.barrier()
        return cls(folder)

    @property
    def tasks(self) -> list[str]:
        """Names of the signatures in order, ``base`` among them if it has one."""
        return self.retriever.tasks

    def path(self, task: str) -> Path:
        """Where a task's delta lies."""
        return self.folder / "deltas" / f"{task}.safetensors"

    def add(self, signature: Signature, delta: Delta | None) -> None:
        """Keep a task; rank 0 writes. Collective.

        Raises:
            ValueError: the task is there already, or the delta is of another base model or another task.
        """
        if delta is not None:
            if delta.task != signature.task:
                raise ValueError(
                    f"delta {delta.task!r}: comes with the signature of {signature.task!r}; give both the same task"
                )
            check_base(delta.mask, self.base, f"delta {delta.task!r}")
        self.retriever.add(signature)
        if dist.is_main():
            if delta is not None:
                delta.save(self.path(delta.task))
            save_signatures(
                self.folder / "signatures.safetensors", self.retriever.signatures, {"base": self.base}
            )
        dist.barrier()

    def delta(self, task: str) -> Delta | None:
        """A task's delta; None for the base model.

        Raises:
            ValueError: no such task, or its file is missing or corrupt.
        """
        if task == BASE:
            return None
        if task not in self.tasks:
            raise ValueError(
                f"task={task!r}: not in the bank {self.folder}; it holds {', '.join(self.tasks)}"
            )
        return Delta.load(self.path(task))

    @contextmanager
    def activated(self, model: ShardedModel, task: str) -> Iterator[None]:
        """Inside the block the model is the task's; afterwards it is the base again, bit for bit. Collective."""
        with applied(model, self.delta(task)):
            yield

    def retrieve(self, representations: Tensor) -> list[str]:
        """The task of each prompt: representations [N, D] -> N names."""
        names = self.tasks
        return [names[index] for index in self.retriever.predict(representations).tolist()]


def compose(deltas: Sequence[Delta], base: ShardedModel, task: str) -> Delta:
    """One delta whose values are base + the sum of the deltas' changes, on the union of their masks. Collective.

    Where masks do not overlap this holds every delta exactly; where they do, changes add up, as in task arithmetic.

    Raises:
        ValueError: no deltas, or they are of different base models, granularities or shapes.
    """
    if not deltas:
        raise ValueError("deltas: there are none to compose; give at least one")
    mask = deltas[0].mask
    for other in deltas[1:]:
        mask = combine(mask, other.mask, "union")
    mask = mask.with_meta(task=task, method="composed")
    start = extract_delta(base, mask, task)
    values = {name: _add_changes(deltas, name, mask.elements(name), start.values[name]) for name in mask}
    return Delta(mask, values, task)


def _add_changes(deltas: Sequence[Delta], name: str, entries: Tensor, own: Tensor) -> Tensor:
    """``own`` [entries] plus the deltas' changes of one parameter."""
    places = {
        index: torch.searchsorted(entries, delta.mask.elements(name))
        for index, delta in enumerate(deltas)
        if name in delta.mask.units
    }
    total, times = own.double().clone(), torch.zeros(len(own), dtype=torch.int32)
    for index, place in places.items():
        total[place] += deltas[index].values[name].double() - own[place].double()
        times[place] += 1
    result = total.to(own.dtype)
    for index, place in places.items():  # own + (tuned - own) may differ from tuned in the last bit
        once = times[place] == 1
        result[place[once]] = deltas[index].values[name][once]
    return result
