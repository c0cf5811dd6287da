"""What a writer can do to a bank: start it, add a task, remove and rename one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trace_dist.bank.delta import Delta, check_base
from trace_dist.bank.facts import check_dtype, describe, dtype_of, kind_of
from trace_dist.bank.index import Index, Record
from trace_dist.bank.prompts import PromptSets, save_prompts
from trace_dist.bank.recipe import Recipe
from trace_dist.bank.signature import Signature, check_comparable
from trace_dist.bank.sketch import Sketch
from trace_dist.bank.writer import Writer, locked, read_index
from trace_dist.config.bank import Pooling
from trace_dist.config.checks import AUTO, check
from trace_dist.models.fingerprint import fuller, same_model
from trace_dist.run_folder import ADAPTED, DELTA, PROMPTS, RECIPE, SIGNATURE, SKETCH, BankFolder
from trace_dist.utils.names import BASE, check_new_name, check_task_name
from trace_dist.utils.sealed import same_content


@dataclass(frozen=True)
class Task:
    """What is kept of a task (or, without a delta, of the base model).

    Raises:
        ValueError: the name is no name of a task, or the parts do not belong together.
    """

    signature: Signature
    delta: Delta | None
    sketch: Sketch | None = None
    facts: Mapping[str, Any] | None = None
    prompts: PromptSets | None = None
    adapted: Signature | None = None
    recipe: Recipe | None = None
    """What it began with; not None iff ``delta`` is its own part alone."""

    def __post_init__(self) -> None:
        name = self.signature.task
        if self.delta is None:
            if name != BASE:
                raise ValueError(
                    f"signature {name!r}: comes without a delta, which only {BASE!r}, the base model, may; give the delta"
                )
            return
        check_task_name(name, "task")
        if self.delta.task != name:
            raise ValueError(
                f"delta {self.delta.task!r}: comes with the signature of {name!r}; give both the same task"
            )

    def save(self, folder: Path) -> None:
        """Write the task's files."""
        self.signature.save(folder / SIGNATURE)
        if self.delta is not None:
            self.delta.save(folder / DELTA)
        if self.sketch is not None:
            self.sketch.save(folder / SKETCH)
        if self.prompts is not None:
            save_prompts(folder / PROMPTS, self.prompts)
        if self.adapted is not None:
            self.adapted.save(folder / ADAPTED)
        if self.recipe is not None:
            self.recipe.save(folder / RECIPE)


def found(index: Index, files: BankFolder, task: str) -> Record:
    """The record of a task. Raises ValueError where there is none."""
    record = index.get(task)
    if record is None:
        held = ", ".join(index.names) or "nothing yet"
        raise ValueError(f"task={task!r}: not in the bank {files.root}; it holds {held}")
    return record


def held(index: Index, files: BankFolder, task: str, recipe: Recipe) -> list[str]:
    """The tasks that a recipe names, as they are called now.

    Raises:
        ValueError: the bank does not hold one of them.
    """
    records = [index.holder(part.key) for part in recipe.parts]
    lacking = records.count(None)
    if lacking:
        raise ValueError(
            f"task={task!r}: is a recipe over {len(records)} earlier tasks, and the bank {files.root} does not hold {lacking} of "
            "them as they were; add those first, under their own names"
        )
    return [record.name for record in records if record is not None]


def open_or_start(files: BankFolder, base: str, layer: int, pooling: Pooling) -> None:
    """Start a bank where there is none; see that it is of this base model, layer and pooling where there is one.

    Raises:
        ValueError: it is of another one, another process writes it, or its index was lost.
    """
    if not files.index.is_file():
        with locked(files):
            if not files.index.is_file():
                _start(files, Index(base, layer, pooling=pooling))
                return
    index = read_index(files)
    if not same_model(index.base, base):
        raise ValueError(
            f"bank {files.root}: made for the base model {index.base[:12]}, not for {base[:12]}; "
            "choose another folder, or use the model it was made for"
        )
    check_view(files, index, layer, pooling)


def check_view(files: BankFolder, index: Index, layer: int | str, pooling: str) -> None:
    """Raise ValueError unless a bank was made with a layer and a pooling; ``auto`` is whatever it was made with."""
    for field, wanted, found in (("layer", layer, index.layer), ("pooling", pooling, index.pooling)):
        rule = f"the bank {files.root} was made with {found}"
        check(wanted in (found, AUTO), f"bank.{field}", wanted, rule, "set that, or choose another folder")


def _start(files: BankFolder, index: Index) -> None:
    for left in (files.tasks, files.old_deltas, files.old_signatures):
        if left.exists():
            raise ValueError(
                f"bank {files.root}: {left.name} is there but {files.index.name} is missing; "
                "restore it from a copy, or choose another folder"
            )
    files.newest.unlink(missing_ok=True)  # of a bank that was deleted but for its hidden files
    index.save(files.index)


def add(writer: Writer, task: Task) -> None:
    """Add a task, or do nothing where it is there with the same bytes.

    Raises:
        ValueError: it is there with other bytes, or does not belong into this bank.
    """
    name = task.signature.task
    if task.delta is not None:
        if name not in writer.index.names:
            check_new_name(name, "task")
        check_base(task.delta.mask, writer.index.base, f"delta {name!r}")
        task.delta.check_finite()
    if task.recipe is not None:
        held(writer.index, writer.files, name, task.recipe)
    facts = describe(task.delta, task.signature, task.facts)
    writer.upgrade()
    _check_fits(writer, task.signature, facts)
    present = writer.index.get(name)
    new = writer.stage(Record(name, writer.folder_for(name), facts=facts), task.save)
    if present is None:
        writer.publish(new)
        base = fuller(writer.index.base, _model_of(task))
        writer.commit(replace(writer.index, base=base, records=(*writer.index.records, new)))
        return
    differing = [file for file in new.files if not _same(writer, present, new, file)]
    writer.discard(new)
    if differing:
        raise ValueError(
            f"task={name!r}: in the bank {writer.files.root} already, with another "
            f"{' and another '.join(file.split('.')[0] for file in differing)}; "
            "rename or remove the older one, or give the new one another name (bank add --name)"
        )


def _model_of(task: Task) -> str:
    """Fingerprint of the model that a task's delta was made for; empty where it is not known."""
    return "" if task.delta is None else str(task.delta.mask.meta.get("model") or "")


def _same(writer: Writer, present: Record, new: Record, file: str) -> bool:
    """Whether a file that was staged is the one that the bank holds."""
    if present.files.get(file) == new.files[file]:
        return True
    if file == RECIPE:
        return False
    paths = (writer.files.task(present.folder) / file, writer.temporary(new) / file)
    return file in present.files and same_content(*paths, file.split(".")[0])


def _check_fits(writer: Writer, signature: Signature, facts: Mapping[str, Any]) -> None:
    """Raise ValueError unless a signature can be compared with those in the bank, and the values are of their data type."""
    for record in writer.index.records[:1]:
        check_comparable(signature, kind_of(record.facts))
    known = next((record.facts.get("dim") for record in writer.index.records), None)
    if known is not None and known != signature.dim:
        raise ValueError(
            f"signature {signature.task!r}: hidden size {signature.dim}, must be {known} as in the bank; "
            "fit it on the same base model"
        )
    others = [record.facts for record in writer.index.records if record.name != signature.task]
    dtype = dtype_of(facts)
    check_dtype(dtype, others, f"delta {signature.task!r}: holds {dtype}", writer.files.root)


def remove(writer: Writer, name: str) -> None:
    """Take a task out.

    Raises:
        ValueError: there is no such task, or the recipe of another one needs it.
    """
    gone = found(writer.index, writer.files, name)
    needing = [
        record.name
        for record in writer.index.records
        # Its own one may be damaged, which is why it goes.
        if record is not gone
        and RECIPE in record.files
        and gone.key in [part.key for part in Recipe.load(writer.files.task(record.folder) / RECIPE).parts]
    ]
    if needing:
        raise ValueError(
            f"task={name!r}: {', '.join(needing)} {'is kept' if len(needing) == 1 else 'are kept'} as a recipe that needs it; "
            f"remove {'that one' if len(needing) == 1 else 'those'} first, or learn them with bank.keep: whole"
        )
    records = tuple(record for record in writer.index.records if record is not gone)
    writer.commit(replace(writer.index, records=records))


def rename(writer: Writer, name: str, new: str) -> None:
    """Give a task another name.

    Raises:
        ValueError: there is no such task, or the name cannot be given.
    """
    found(writer.index, writer.files, name)
    if name == BASE:
        raise ValueError(f"task={name!r}: stands for the base model and keeps its name; rename another task")
    check_new_name(new, "task")
    if new in writer.index.names:
        raise ValueError(f"task={new!r}: in the bank {writer.files.root} already; choose another name")
    writer.upgrade()
    records = tuple(
        replace(record, name=new) if record.name == name else record for record in writer.index.records
    )
    writer.commit(replace(writer.index, records=records))
