"""The delta bank: a folder that tasks are added to over months, with a delta and a signature of each.

    bank/bank.json                              the index (bank.index): what there is, with sizes and checksums
    bank/tasks/<folder>/delta.safetensors       tuned values and their mask (bank.delta)
    bank/tasks/<folder>/recipe.json             earlier deltas that the task began with (bank.recipe), where it is kept so
    bank/tasks/<folder>/signature.safetensors   clusters of prompt representations under the frozen base (bank.signature)
    bank/tasks/<folder>/adapted.safetensors     the same under the task's own weights, with bank.representation: adapted
    bank/tasks/<folder>/sketch.safetensors      the proxy's update in little (bank.sketch), where the task was probed
    bank/tasks/<folder>/prompts.safetensors     prompts without their answers (bank.prompts), where they are kept

A signature without a delta, called ``base``, stands for the base model itself: inputs that resemble it are answered
without any delta. How a bank changes, and what a cut leaves, says [Note: changes] in bank/writer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from trace_dist.bank import changes, legacy
from trace_dist.bank.delta import Delta, applied
from trace_dist.bank.facts import check_dtype, describe, kind_of
from trace_dist.bank.index import Index, Record
from trace_dist.bank.prompts import PromptSets, load_prompts
from trace_dist.bank.recipe import Recipe, prepared, taken
from trace_dist.bank.retrieval import Retriever
from trace_dist.bank.signature import Signature, check_comparable
from trace_dist.bank.sketch import Sketch
from trace_dist.bank.writer import Writer, read_index, writing_to
from trace_dist.config.bank import Pooling
from trace_dist.masks.mask import Mask
from trace_dist.parts import SIGNATURES
from trace_dist.run_folder import ADAPTED, DELTA, PROMPTS, RECIPE, SIGNATURE, SKETCH, BankFolder
from trace_dist.sharding.base import ShardedModel
from trace_dist.utils.names import BASE
from trace_dist.utils.together import on_all, on_main

__all__ = ["BASE", "DeltaBank"]

T = TypeVar("T")


class DeltaBank:
    """Deltas of one base model, as they were when the bank was opened. Opening reads the index and nothing else.

    Another process may change the bank meanwhile. What was added or renamed is not seen before ``reload``; a task that was
    removed can no longer be read, and says so. On several ranks all open the bank together and see what rank 0 sees; files
    of tasks are read by each rank.

    Args:
        folder: the bank's folder.

    Raises:
        ValueError: the folder holds no bank, or the index is damaged.
    """

    def __init__(self, folder: Path | str) -> None:
        # Its files are read later, maybe after a change of the working directory.
        self.files = BankFolder(Path(folder).absolute())
        self._index: Index = on_main(lambda: read_index(self.files))
        self._retriever = Retriever()
        self._retrieved: tuple[Record, ...] = ()

    @classmethod
    def create(cls, folder: Path | str, base: str, layer: int, pooling: Pooling = "mean") -> DeltaBank:
        """Open the bank of a base model, with all it holds, or start an empty one where there is none. Collective.

        Args:
            folder: where.
            base: fingerprint of the base model.
            layer: hidden layer that representations are taken from.
            pooling: how a prompt's tokens become one representation (``bank.representation``).

        Raises:
            ValueError: the folder holds a bank of another base model, layer or pooling, or another process writes it.
        """
        on_main(lambda: changes.open_or_start(BankFolder(Path(folder)), base, layer, pooling))
        return cls(folder)

    @property
    def folder(self) -> Path:
        """The bank's folder."""
        return self.files.root

    @property
    def base(self) -> str:
        """Fingerprint of the base model."""
        return self._index.base

    @property
    def layer(self) -> int:
        """Hidden layer that representations are taken from."""
        return self._index.layer

    @property
    def pooling(self) -> Pooling:
        """How a prompt's tokens become one representation."""
        return self._index.pooling

    @property
    def generation(self) -> int:
        """How often the bank was changed."""
        return self._index.generation

    @property
    def index(self) -> Index:
        """What the bank holds."""
        return self._index

    @property
    def is_adapted(self) -> bool:
        """Whether there are tasks, and all have signatures under their own weights."""
        records = [record for record in self._index.records if record.name != BASE]
        return bool(records) and all(ADAPTED in record.files for record in records)

    @property
    def tasks(self) -> list[str]:
        """Names of the signatures in order, ``base`` among them if it has one."""
        return self._index.names

    def reload(self, index: Index | None = None) -> None:
        """See the bank as it is now, or again as it was when ``index`` was read. Collective."""
        self._index = on_main(lambda: read_index(self.files)) if index is None else index

    def path(self, task: str) -> Path:
        """Where a task's delta lies. Raises ValueError where there is no such task."""
        return self._path(self._record(task), DELTA)

    def delta_bytes(self, task: str) -> int | None:
        """Size of a task's delta file, and of its recipe, in bytes; None for the base model.

        Raises:
            ValueError: there is no such task.
        """
        if task == BASE:
            return None
        files = self._record(task).files
        if DELTA not in files:
            return self.path(task).stat().st_size
        return sum(files[file].num_bytes for file in (DELTA, RECIPE) if file in files)

    def facts(self, task: str) -> Mapping[str, Any]:
        """What the index says of a task: as ``bank.facts.describe`` has it."""
        record = self._record(task)
        return record.facts if record.folder else describe(self.delta(task), self.signature(task))

    def delta(self, task: str) -> Delta | None:
        """A task's delta; None for the base model.

        Raises:
            ValueError: no such task, its file is missing or corrupt, or it is kept as a recipe, which ``delta_on`` reads.
        """
        if RECIPE in self._record(task).files:
            needed = ", ".join(self.needs(task))
            raise ValueError(
                f"task={task!r}: is kept as a recipe over {needed}, which the base's weights complete; use "
                "DeltaBank.delta_on(task, model)"
            )
        return self.own_delta(task)

    def own_delta(self, task: str) -> Delta | None:
        """What a task's delta file holds: all of it, or its own part where the task is kept as a recipe.

        Raises:
            ValueError: as ``delta``.
        """
        self._record(task)
        if task == BASE:
            return None
        return replace(self._read(task, DELTA, Delta.load), task=task)

    def delta_on(self, task: str, model: ShardedModel) -> Delta | None:
        """A task's whole delta, in whatever form it is kept; None for the base model. Collective.

        Args:
            task: the task.
            model: holds the base's values.

        Raises:
            ValueError: as ``delta``, on all ranks.
        """
        recipe, own = on_all(lambda: (self.recipe(task), self.own_delta(task)))
        if recipe is None or own is None:
            return own
        parts = [self.delta_on(name, model) for name in self.needs(task)]
        return prepared(recipe, [part for part in parts if part is not None], own, model)

    def recipe(self, task: str) -> Recipe | None:
        """What a task began with, where it is kept as a recipe. Raises ValueError as ``delta``."""
        if RECIPE not in self._record(task).files:
            return None
        return self._read(task, RECIPE, Recipe.load)

    def needs(self, task: str) -> list[str]:
        """The earlier tasks that a task's recipe is made of, by their present names; none where it is not kept as one.

        Raises:
            ValueError: as ``delta``, or the bank does not hold one of them.
        """
        recipe = self.recipe(task)
        return [] if recipe is None else changes.held(self._index, self.files, task, recipe)

    def mask(self, task: str) -> Mask:
        """A task's mask, without reading its values; with the entries that its recipe changes, where it has one.

        Raises:
            ValueError: as ``own_delta``, or the task is the base model.
        """
        if task == BASE:
            raise ValueError(f"task={task!r}: the base model has no mask; leave it out")
        known = self._record(task).facts.get("mask")
        own: Mask = self._read(task, DELTA, lambda path, _: Delta.load_mask(path, known))
        begun = self.begun(task)
        return own if begun is None else (own | begun).with_meta(**own.meta)

    def begun(self, task: str) -> Mask | None:
        """The entries that a task's recipe changes; None where it has none, or it changes nothing.

        Raises:
            ValueError: as ``mask``.
        """
        recipe = self.recipe(task)
        if recipe is None:
            return None
        return taken(list(map(self.mask, self.needs(task))), [part.scalars for part in recipe.parts])

    def signature(self, task: str) -> Signature:
        """A task's signature. Raises ValueError as ``delta`` does."""
        return replace(self._read(task, SIGNATURE, Signature.load), task=task)

    def adapted(self, task: str) -> Signature:
        """A task's signature under its own weights; for the base model that is its signature.

        Raises:
            ValueError: as ``delta``, or the bank has none.
        """
        self.check_adapted([task])
        if task == BASE:
            return self.signature(task)
        return replace(self._read(task, ADAPTED, Signature.load), task=task)

    def check_adapted(self, tasks: Iterable[str] | None = None) -> None:
        """Raise ValueError where a task has no signature under its own weights; all tasks unless some are named."""
        names = self.tasks if tasks is None else tasks
        lacking = [name for name in names if name != BASE and ADAPTED not in self._record(name).files]
        if lacking:
            raise ValueError(
                f"bank.representation='adapted': the bank {self.folder} has no signature of {', '.join(lacking)} under "
                "its own weights; set bank.representation: base, or remove these tasks and learn them again with adapted"
            )

    def sketch(self, task: str) -> Sketch | None:
        """A task's sketch; None where the bank has none. Raises ValueError as ``delta`` does."""
        if SKETCH not in self._record(task).files:
            return None
        return self._read(task, SKETCH, Sketch.load)

    def prompts(self, task: str) -> PromptSets | None:
        """A task's prompts; None where the bank keeps none. Raises ValueError as ``delta`` does."""
        if PROMPTS not in self._record(task).files:
            return None
        return self._read(task, PROMPTS, load_prompts)

    @property
    def retriever(self) -> Retriever:
        """Retrieval among the tasks; the signatures are read at the first use, those that were added since at the next."""
        records, held = self._index.records, len(self._retrieved)
        grown = records[:held] == self._retrieved
        new = records[held:] if grown else records
        # First of all: where one is damaged and the index is put back, tasks of it may be gone from the disk.
        signatures = list(map(self._signature_of, new))
        if not grown:
            self._retriever, self._retrieved = Retriever(), ()
        for record, signature in zip(new, signatures, strict=True):
            self._retriever.add(signature)
            self._retrieved = (*self._retrieved, record)
        return self._retriever

    def _signature_of(self, record: Record) -> Signature:
        """A task's signature; what has been read of the same file is not read again, whatever the task was called."""
        file = record.files.get(SIGNATURE)
        for held, signature in zip(self._retrieved, self._retriever.signatures, strict=True):
            if file is not None and held.files.get(SIGNATURE) == file:
                return replace(signature, task=record.name)
        return self.signature(record.name)

    def retrieve(self, representations: Tensor, reject: float | None = None) -> list[str]:
        """The task of each prompt.

        Args:
            representations: [N, D] floating, of the bank's base, layer and pooling (``bank.representation.represent``).
            reject: share of a task's own prompts that may be taken for none of the bank's, and go to ``base``;
                None to reject nothing (``bank.rejection``).

        Returns:
            N names of tasks; ``base`` for prompts like the general sets', and for those that are rejected.

        Raises:
            ValueError: the bank is empty, a signature is missing or corrupt, the shape is another, or a value is not finite.
        """
        return self.retriever.retrieve(representations, reject)

    def check_kind(self, kind: str) -> None:
        """Raise ValueError unless signatures of a kind may be added."""
        for record in self._index.records[:1]:
            check_comparable((kind, SIGNATURES.load(kind).likelihood), kind_of(self.facts(record.name)))

    def check_dtype(self, dtype: str) -> None:
        """Raise ValueError unless tasks that a model of a data type learns may be added."""
        tasks = [task for task in self.tasks if task != BASE]
        facts = on_main(lambda: [self.facts(task) for task in tasks])
        check_dtype(dtype, facts, f"target.dtype={dtype!r}", self.folder)

    @contextmanager
    def activated(self, model: ShardedModel, task: str) -> Iterator[None]:
        """Inside the block the model is the task's; afterwards it is the base again, bit for bit. Collective.

        Args:
            model: the bank's base, on any backend, in the dtype that the deltas have.
            task: whose delta; ``base`` changes nothing.

        Raises:
            ValueError: as ``delta``, or the delta is of another model or dtype.
        """
        with applied(model, self.delta_on(task, model)):
            yield

    def add(
        self,
        signature: Signature,
        delta: Delta | None,
        sketch: Sketch | None = None,
        facts: Mapping[str, Any] | None = None,
        prompts: PromptSets | None = None,
        adapted: Signature | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        """Keep a task; rank 0 writes. Nothing happens where the very same task is there already. Collective.

        Args:
            signature: of the task, or of the base model.
            delta: of the task; None for the base model.
            sketch: of the proxy's update, for the specificity of later tasks.
            facts: small JSON values for the index, such as the learning rate and the steps. Dates and times do not belong
                here: work that is done again must give the same bytes.
            prompts: of the task, without answers, for whoever folds the bank later.
            adapted: the task's signature under its own weights (``bank.adapted``).
            recipe: what the task began with, where ``delta`` is its own part alone (``bank.recipe``).

        Raises:
            ValueError: the name is no name of a task, or there with other bytes; the delta is of another base model or
                another task; the bank lacks a task that the recipe needs; or another process writes the bank.
        """
        task = changes.Task(signature, delta, sketch, facts, prompts, adapted, recipe)
        self._change(lambda writer: changes.add(writer, task))

    def remove(self, task: str) -> None:
        """Take a task out of the bank and delete its files; rank 0 writes. Collective.

        Raises:
            ValueError: no such task, the recipe of another one needs it, or another process writes the bank.
        """
        self._change(lambda writer: changes.remove(writer, task))

    def rename(self, task: str, name: str) -> None:
        """Give a task another name; its files stay as they are. Collective.

        Raises:
            ValueError: no such task, the name is taken or is no name of a task, or another process writes the bank.
        """
        self._change(lambda writer: changes.rename(writer, task, name))

    def _change(self, change: Callable[[Writer], None]) -> None:
        def write() -> Index:
            with writing_to(self.files) as writer:
                change(writer)
                return writer.index

        self._index = on_main(write)

    def _record(self, task: str) -> Record:
        return changes.found(self._index, self.files, task)

    def _path(self, record: Record, file: str) -> Path:
        if not record.folder:
            return self.files.old_delta(record.name)
        return self.files.task(record.folder) / file

    def _read(self, task: str, file: str, load: Callable[[Path, str | None], T]) -> T:
        """One of a task's files, of the bank as it was opened; an old bank may have been upgraded since."""
        record = self._record(task)
        try:
            return self._load(record, file, load)
        except ValueError:
            now = self._index
            with suppress(ValueError):
                now = read_index(self.files)
            # Another bank in the place of this one may be of the same generation.
            if now == self._index:
                raise
        moved = now.get(task)
        if moved is not None and self._index.version == 1:
            return self._load(moved, file, load)
        raise ValueError(
            f"{self.folder}: the bank was changed since it was opened (generation {self.generation}, now "
            f"{now.generation}) and {task!r} is not there as it was; open the bank again"
        )

    def _load(self, record: Record, file: str, load: Callable[[Path, str | None], T]) -> T:
        if not record.folder and file == SIGNATURE:
            return legacy.signature(self.files, record.name)  # type: ignore[return-value]
        member = record.files.get(file)
        return load(self._path(record, file), member.sha256 if member else None)
