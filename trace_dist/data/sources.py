"""Where examples come from: files, folders, datasets on the hub, reasoning-gym.

Every source yields the same thing: two lists of examples (data/examples.py), one to train on and one to test
on, that share no prompt. A source without a test part of its own is split by a hash of the prompt, so that
an example stays on its side when the source grows. Training examples whose prompt is also tested are dropped.
Only where that would drop more than half of them (a task with a few hundred possible prompts) are
they kept, and the overlap is logged and reported (``Task.overlap_percent``).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache as once

import datasets
import numpy as np

from trace_dist.config import TaskConfig
from trace_dist.data.columns import Form, find_form, say_form
from trace_dist.data.examples import Example, prompt_key
from trace_dist.data.generated import derived_seed, generated
from trace_dist.data.reading import TEST, TRAIN, VALIDATION, read_splits
from trace_dist.data.tables import Table
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)

# One prompt in ten is a test prompt where the source does not say which.
_TEST_ONE_IN = 10
_VALIDATIONS = (VALIDATION, "valid", "val", "dev", "eval")


@dataclass(frozen=True)
class Splits:
    """Examples to train and to test on."""

    train: list[Example]
    test: list[Example]


def load_examples(task: TaskConfig, seed: int) -> Splits:
    """Read or generate a task's examples.

    Args:
        task: source, columns and the number of examples wanted; a source with fewer gives fewer.
        seed: decides which examples are picked, their order, and what reasoning-gym generates.

    Raises:
        ValueError: the source is missing, empty, lacks a split or a column, holds a value that is neither a
            string nor a number, or (reasoning-gym) is not installed, unknown, or has no answers.
    """
    train, test = generated(task, seed) if task.reasoning_gym is not None else _from_path(task)
    for split, examples in (("train", train), ("test", test)):
        if not examples:
            raise ValueError(f"tasks.{task.name}: the {split} split is empty; give the source more examples")
    test = _pick(test, task.num_test, derived_seed(seed, "pick test"))
    train = _pick(_without(train, test, task.name), task.num_train, derived_seed(seed, "pick train"))
    return Splits(train, test)


def form_of(task: TaskConfig) -> Form:
    """Which columns of its path a task reads.

    Raises:
        ValueError: as ``load_examples``.
    """
    train, _ = _parts(task)
    return find_form(task, train.columns, train.where)


def _pick(examples: list[Example], num: int, seed: int) -> list[Example]:
    order = np.random.default_rng(seed).permutation(len(examples))[:num]
    return [examples[i] for i in order]


def _without(train: list[Example], test: list[Example], name: str) -> list[Example]:
    tested = {prompt_key(example["prompt"]) for example in test}
    kept = [example for example in train if prompt_key(example["prompt"]) not in tested]
    num_dropped = len(train) - len(kept)
    if 2 * num_dropped > len(train):
        _say_kept(name, num_dropped, len(train))
        return train
    if num_dropped:
        logger.debug("tasks.%s: dropped %d training examples whose prompt is tested", name, num_dropped)
    return kept


@once
def _say_kept(name: str, num_tested: int, num: int) -> None:
    logger.warning(
        "tasks.%s: %d of %d training examples have a prompt that is tested too; the task has too few "
        "prompts to separate them, so they are kept and its scores include recall",
        name, num_tested, num,
    )  # fmt: skip


def _from_path(task: TaskConfig) -> tuple[list[Example], list[Example]]:
    train, test = _parts(task)
    examples = _examples(train, task)
    if test is None:
        return _split_by_hash(examples, train.where)
    return examples, _examples(test, task)


def _examples(table: Table, task: TaskConfig) -> list[Example]:
    """Check and convert the rows of a split."""
    if not len(table):
        return []
    columns = table.columns
    form = find_form(task, columns, table.where)
    say_form(task, form, columns)
    examples = []
    for i, row in enumerate(table.rows([*form.columns, *form.optional])):
        for column in form.columns:
            if column not in row:
                raise ValueError(
                    f"{table.where}: example {i} has no column {column!r}, it has {sorted(row)}; "
                    "give every example the same columns"
                )
        example = form.read(row, f"{table.where}: example {i}")
        if example is not None:
            examples.append(example)
    return examples


def _split_by_hash(examples: list[Example], where: str) -> tuple[list[Example], list[Example]]:
    train: list[Example] = []
    test: list[Example] = []
    for example in examples:
        digest = hashlib.sha256(prompt_key(example["prompt"]).encode()).digest()
        (train if int.from_bytes(digest[:8]) % _TEST_ONE_IN else test).append(example)
    if examples and not (train and test):
        raise ValueError(
            f"{where}: {len(examples)} examples are too few to split off a test set by hash; "
            "add examples or give the source a test split of its own"
        )
    return train, test


def _parts(task: TaskConfig) -> tuple[Table, Table | None]:
    """The rows to train and to test on; None where the source has none for testing."""
    found, complete = read_splits(task)
    if task.split is None and len(found) == 1 and not complete:
        # The only split is the one to train on, whatever its name.
        ((name, trained),) = found.items()
    else:
        name = task.split or TRAIN
        trained = _named(found, name, task, "split")
    if task.test_split is not None:
        return trained, _named(found, task.test_split, task, "test_split")
    for split in (TEST,) if complete else (TEST, *_VALIDATIONS):
        if split in found and split != name.partition("[")[0]:
            if split != TEST:
                _say_validation(task.name, split)
            return trained, found[split]
    if complete:
        raise ValueError(
            f"tasks.{task.name}.path={task.path!r}: no split {TEST!r}, it has {sorted(found)}; rename or add the split, "
            f"or name one by tasks.{task.name}.test_split"
        )
    return trained, None


@once
def _say_validation(name: str, split: str) -> None:
    logger.info("tasks.%s: there is no split test; %s is tested", name, split)


def _named(found: dict[str, Table], name: str, task: TaskConfig, key: str) -> Table:
    """A split, or the part of it that ``train[:90%]`` names, as ``datasets`` writes it; ``key`` is the field that does."""
    lengths = {split: len(table) for split, table in found.items()}
    try:
        (part,) = datasets.ReadInstruction.from_spec(name).to_absolute(lengths)
    # Unknown, malformed, or several of them joined by a plus.
    except (ValueError, AssertionError):
        raise ValueError(
            f"tasks.{task.name}.path={task.path!r}: no split {name!r}, it has {sorted(found)}; rename or add the split, "
            f"or name one by tasks.{task.name}.{key}"
        ) from None
    return found[part.splitname].part(part.from_, part.to)
