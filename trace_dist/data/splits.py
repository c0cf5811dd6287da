"""Which rows of a source are for training, for testing and for validation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache as once

import datasets

from trace_dist.config import TaskConfig
from trace_dist.data.reading import TEST, TRAIN, VALIDATION, beside, read_splits
from trace_dist.data.tables import Table
from trace_dist.utils.home import from_home
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)

_VALIDATIONS = (VALIDATION, "valid", "val", "dev", "eval")


@dataclass(frozen=True)
class Parts:
    """The rows of a source. ``test``: None where it has none for testing. ``validation``: rows of its own that are not tested."""

    train: Table
    test: Table | None
    validation: Table | None = None


def parts_of(task: TaskConfig) -> Parts:
    """The rows of a task's path.

    Raises:
        ValueError: there is no such source or split, or it cannot be read.
    """
    found, complete = read_splits(task)
    if task.split is None and len(found) == 1 and not complete:
        # The only split is the one to train on, whatever its name.
        ((name, trained),) = found.items()
    else:
        name = task.split or TRAIN
        trained = _named(found, name, task, "split")
    tested = _tested(task, found, complete, name)
    test = None if tested is None else _named(found, tested, task, "test_split")
    return Parts(trained, test, _own_validation(task, found, {name, tested}))


def _tested(task: TaskConfig, found: dict[str, Table], complete: bool, trained: str) -> str | None:
    """Name of the split to test on; None where the source has none for it."""
    if task.test_split is not None:
        return task.test_split
    for split in (TEST,) if complete else (TEST, *_VALIDATIONS):
        if split in found and split not in map(_whole, (trained, task.validation_split)):
            if split != TEST:
                _say_tested(task.where, split)
            return split
    if complete:
        raise ValueError(
            f"{task.where}.path={task.path!r}: no split {TEST!r}, it has {sorted(found)}; rename or add the split, "
            f"or name one by {task.where}.test_split"
        )
    return None


def _own_validation(task: TaskConfig, found: dict[str, Table], used: set[str | None]) -> Table | None:
    """The rows that a source has for validation: the split that is named, or one that is neither trained nor tested."""
    if task.validation_split is not None:
        return _named(found, task.validation_split, task, "validation_split")
    taken = set(map(_whole, used))
    return next((found[split] for split in _VALIDATIONS if split in found and split not in taken), None)


def _whole(split: str | None) -> str | None:
    """The split of which a part is named."""
    return None if split is None else split.partition("[")[0]


@once
def _say_tested(task: str, split: str) -> None:
    logger.info("%s: there is no split test; %s is tested", task, split)


def _named(found: dict[str, Table], name: str, task: TaskConfig, key: str) -> Table:
    """A split, or the part of it that ``train[:90%]`` names, as ``datasets`` writes it; ``key`` is the field that does."""
    lengths = {split: len(table) for split, table in found.items()}
    try:
        (part,) = datasets.ReadInstruction.from_spec(name).to_absolute(lengths)
    # Unknown, malformed, or several of them joined by a plus.
    except (ValueError, AssertionError):
        raise ValueError(
            f"{task.where}.path={task.path!r}: no split {name!r}, it has {sorted(found)}; rename or add the split, "
            f"or name one by {task.where}.{key}"
        ) from None
    return found[part.splitname].part(part.from_, part.to)


def validation_file(task: TaskConfig) -> Table | None:
    """The rows of ``validation_path``, or of the file ``<name>.validation.<kind>`` beside the source; None without either.

    Raises:
        ValueError: the file that is named is not there, or cannot be read.
    """
    path = from_home(str(task.path))
    named = task.validation_path
    file = beside(path, VALIDATION) if named is None else from_home(named)
    if file.is_file() and (named is not None or (path.is_file() and task.validation_split is None)):
        alone = replace(task, validation_path=None, validation_split=None, split=None, test_split=None)
        return parts_of(replace(alone, path=str(file), subset=None, revision=None)).train
    if named is not None:
        raise ValueError(f"{task.where}.validation_path={named!r}: no such file; fix the path")
    return None
