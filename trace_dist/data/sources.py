"""Where examples come from: files, folders, datasets on the hub, reasoning-gym.

Every source yields the same thing: two lists of examples (data/examples.py), one to train on and one to test
on, that share no prompt. A source without a test part of its own is split by a hash of the prompt, so that
an example stays on its side when the source grows. Training examples whose prompt is also tested are dropped.
Only where that would drop more than half of them (a task with a few hundred possible prompts) are
they kept, and the overlap is logged and reported (``Task.overlap_percent``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cache as once

import numpy as np

from trace_dist.config import TaskConfig
from trace_dist.data.columns import Form, find_form, say_form
from trace_dist.data.examples import Example, prompt_key
from trace_dist.data.generated import derived_seed, generated
from trace_dist.data.splits import parts_of, validation_file
from trace_dist.data.tables import Table
from trace_dist.data.validation import by_hash, hold_out
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)

# One prompt in ten is a test prompt where the source does not say which.
_TEST_ONE_IN = 10


@dataclass(frozen=True)
class Splits:
    """Examples to train, to test and to validate on; of the last there are none where a run does not validate."""

    train: list[Example]
    test: list[Example]
    validation: list[Example] = field(default_factory=list)


def load_examples(task: TaskConfig, seed: int, validate: bool = False) -> Splits:
    """Read or generate a task's examples.

    Args:
        task: source, columns and the number of examples wanted; a source with fewer gives fewer.
        seed: decides which examples are picked, their order, and what reasoning-gym generates.
        validate: whether validation examples are wanted.

    Raises:
        ValueError: the source is missing, empty, lacks a split or a column, holds a value that is neither a
            string nor a number, or (reasoning-gym) is not installed, unknown, or has no answers; or no example is
            left to validate on.
    """
    own: list[Example] | None = None
    if task.reasoning_gym is not None:
        train, test = generated(task, seed)
    else:
        train, test, own = _from_path(task, validate)
    train, test = _answered(train, task), _answered(test, task)
    own = None if own is None else _answered(own, task)
    for split, examples in (("train", train), ("test", test)):
        if not examples:
            where = task.where + (f".path={task.path!r}" if task.path is not None else "")
            raise ValueError(f"{where}: the {split} split is empty; give the source more examples")
    test = _pick(test, task.num_test, derived_seed(seed, "pick test"))
    train = _without(train, test, task.where)
    validation: list[Example] = []
    if validate:
        train, validation = _validated(task, train, test, own)
    return Splits(_pick(train, task.num_train, derived_seed(seed, "pick train")), test, validation)


def form_of(task: TaskConfig) -> Form:
    """Which columns of its path a task reads.

    Raises:
        ValueError: as ``load_examples``.
    """
    train = parts_of(task).train
    if not len(train):
        raise ValueError(f"{train.where}: holds no examples; write some")
    return find_form(task, train.columns, train.where)


def _pick(examples: list[Example], num: int, seed: int) -> list[Example]:
    order = np.random.default_rng(seed).permutation(len(examples))[:num]
    return [examples[i] for i in order]


def _answered(examples: list[Example], task: TaskConfig) -> list[Example]:
    """Those whose answer is one of the task's."""
    if task.answers is None:
        return examples
    wanted = set(task.answers)
    unknown = wanted - {example["answer"] for example in examples}
    if unknown and examples:
        raise ValueError(
            f"{task.where}.answers={task.answers!r}: no example has the answer {min(unknown)!r}; the answers are "
            f"{sorted({example['answer'] for example in examples})[:20]}"
        )
    return [example for example in examples if example["answer"] in wanted]


def _prompts(examples: Collection[Example]) -> set[str]:
    return {prompt_key(example["prompt"]) for example in examples}


def _without(train: list[Example], test: list[Example], task: str) -> list[Example]:
    tested = _prompts(test)
    kept = [example for example in train if prompt_key(example["prompt"]) not in tested]
    num_dropped = len(train) - len(kept)
    if 2 * num_dropped > len(train):
        _say_kept(task, num_dropped, len(train))
        return train
    if num_dropped:
        logger.debug("%s: dropped %d training examples whose prompt is tested", task, num_dropped)
    return kept


@once
def _say_kept(task: str, num_tested: int, num: int) -> None:
    logger.warning(
        "%s: %d of %d training examples have a prompt that is tested too; the task has too few "
        "prompts to separate them, so they are kept and its scores include recall",
        task, num_tested, num,
    )  # fmt: skip


def _validated(
    task: TaskConfig, train: list[Example], test: list[Example], own: list[Example] | None
) -> tuple[list[Example], list[Example]]:
    """Training examples, and those to validate on: the source's own, or held out."""
    tested = _prompts(test)
    if own is None:
        stays, held = hold_out(train, task.num_validation, tested)
        if not held:
            raise ValueError(
                f"{task.where}: no prompt can be held out to validate on, all {len(train)} training examples are of one "
                "prompt, or of prompts that are tested; give more examples or a validation_path, or set train.eval_every to 0"
            )
        _say_validation(
            task.where, f"{len(held)} of {len(train)} training examples, held out by a hash of their prompts"
        )
        return stays, held
    known = tested | _prompts(train)
    apart = [example for example in own if prompt_key(example["prompt"]) not in known]
    if not apart:
        raise ValueError(
            f"{task.where}: none of its {len(own)} validation examples has a prompt that is neither trained nor tested; "
            "name other examples by validation_split or validation_path, or others to train on by split"
        )
    kept = by_hash(apart, task.num_validation)
    dropped = (
        f" ({len(own) - len(apart)} left out whose prompts are trained or tested)"
        if len(apart) < len(own)
        else ""
    )
    _say_validation(task.where, f"{len(kept)} of {len(own)} examples of its own{dropped}")
    return train, kept


@once
def _say_validation(task: str, what: str) -> None:
    logger.info("%s: validated on %s", task, what)


def _from_path(task: TaskConfig, validate: bool) -> tuple[list[Example], list[Example], list[Example] | None]:
    """Examples to train, to test and, where the source has some of its own for it, to validate on."""
    parts = parts_of(task)
    train, own = _examples(parts.train, task), None
    if validate:
        table = validation_file(task) or parts.validation
        own = None if table is None else _examples(table, task)
    if parts.test is None:
        return *_split_by_hash(train, parts.train.where, task.where), own
    return train, _examples(parts.test, task), own


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
    _check_answered(examples, table.where, task.where)
    return examples


def _check_answered(examples: list[Example], where: str, task: str) -> None:
    """Raise ValueError where every answer is empty, as in a test split whose answers are withheld; say where some are."""
    num_empty = sum(not example["answer"].strip() for example in examples)
    if examples and num_empty == len(examples):
        raise ValueError(
            f"{where}: all {num_empty} answers are empty; name another column by {task}.answer_field, or another split"
        )
    if num_empty:
        _say_empty(task, where, num_empty, len(examples))


@once
def _say_empty(task: str, where: str, num_empty: int, num: int) -> None:
    logger.warning(
        "%s: %d of %d answers of %s are empty, and the model learns to say nothing there; "
        "drop these examples where answers are missing",
        task, num_empty, num, where,
    )  # fmt: skip


def _split_by_hash(examples: list[Example], where: str, task: str) -> tuple[list[Example], list[Example]]:
    train: list[Example] = []
    test: list[Example] = []
    for example in examples:
        digest = hashlib.sha256(prompt_key(example["prompt"]).encode()).digest()
        (train if int.from_bytes(digest[:8]) % _TEST_ONE_IN else test).append(example)
    if examples and not (train and test):
        prompts, cure = len(_prompts(examples)), "give the source a test split of its own"
        if prompts == 1 < len(examples):
            raise ValueError(
                f"{where}: all {len(examples)} examples have the same prompt, so that none can be split off to test; name "
                f"another column by {task}.prompt_field, or {cure}"
            )
        of = f" of {prompts} prompts" if prompts < len(examples) else ""
        raise ValueError(
            f"{where}: {len(examples)} examples{of} are too few to split off a test set by hash; add examples or {cure}"
        )
    return train, test
