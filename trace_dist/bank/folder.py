"""A task that lies in a folder by itself, or as ``tasks/<folder>`` of another bank.

A task that was renamed keeps its files, so its name is what the index of its bank says; so are the facts of its training.
"""

from __future__ import annotations

from dataclasses import replace
from os.path import abspath
from pathlib import Path

from trace_dist.bank.bank import DeltaBank
from trace_dist.bank.changes import Task
from trace_dist.bank.delta import Delta
from trace_dist.bank.prompts import load_prompts
from trace_dist.bank.recipe import Recipe
from trace_dist.bank.signature import Signature
from trace_dist.bank.sketch import Sketch
from trace_dist.run_folder import ADAPTED, DELTA, PROMPTS, RECIPE, SIGNATURE, SKETCH, BankFolder
from trace_dist.utils.names import BASE


def read_task(source: Path, bank: DeltaBank, name: str | None = None) -> Task:
    """Read a task that shall be added to a bank.

    Args:
        source: the folder of its files.
        bank: that it shall be added to.
        name: that it shall have there; the one that it has when None.

    Raises:
        ValueError: a file is missing or damaged, or the bank that the folder belongs to holds another layer's representations.
    """
    # A link may lead to a task of a bank, and a bank may hold a link to the files of a task.
    for place in (Path(abspath(source)), source.resolve()):
        files = BankFolder(place.parent.parent)
        if place.parent != files.tasks or not files.index.is_file():
            continue
        other = DeltaBank(files.root)
        for record in other.index.records:
            if record.folder == place.name:
                if (other.layer, other.pooling) != (bank.layer, bank.pooling):
                    raise ValueError(
                        f"source={str(source)!r}: its bank represents prompts by layer {other.layer}, {other.pooling}, "
                        f"{bank.folder} by layer {bank.layer}, {bank.pooling}; learn the task again with "
                        f"bank.layer={bank.layer} and bank.pooling={bank.pooling}"
                    )
                return _of_bank(other, record.name, name)
    signature, delta = Signature.load(source / SIGNATURE), Delta.load(source / DELTA)
    return Task(
        signature if name is None else replace(signature, task=name),
        delta if name is None else replace(delta, task=name),
        Sketch.load(source / SKETCH) if (source / SKETCH).is_file() else None,
        prompts=load_prompts(source / PROMPTS) if (source / PROMPTS).is_file() else None,
        adapted=Signature.load(source / ADAPTED) if (source / ADAPTED).is_file() else None,
        recipe=Recipe.load(source / RECIPE) if (source / RECIPE).is_file() else None,
    )


def _of_bank(bank: DeltaBank, task: str, name: str | None) -> Task:
    """A task of a bank, with what its index says of the training."""
    if task == BASE:
        raise ValueError(
            f"task={task!r}: is the base model of {bank.folder} and no task; name the folder of a task"
        )
    new, delta = name or task, bank.own_delta(task)
    record = bank.index.get(task)
    adapted = bank.adapted(task) if record is not None and ADAPTED in record.files else None
    return Task(
        replace(bank.signature(task), task=new),
        None if delta is None else replace(delta, task=new),
        bank.sketch(task),
        bank.facts(task).get("training"),
        bank.prompts(task),
        adapted,
        bank.recipe(task),
    )
