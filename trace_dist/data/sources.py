"""Where prompt/answer examples come from: JSON lines, TRACE folders, ``datasets`` folders, reasoning-gym.

Every source yields the same thing: two lists of ``{"prompt", "answer"}``, one to train on and one to test
on, that share no prompt. A source without a test part of its own is split by a hash of the prompt, so that
an example stays on its side when the file grows. Training examples whose prompt is also tested are dropped.
Only where that would drop more than half of them (a task with a few hundred possible prompts) are
they kept, and the overlap is logged and reported (``Task.overlap_percent``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from trace_dist.config import TaskConfig
from trace_dist.data.files import check_characters, read_json_lines, read_json_list
from trace_dist.data.generated import Example, derived_seed, generated
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)

# One prompt in ten is a test prompt where the source does not say which.
_TEST_ONE_IN = 10


@dataclass(frozen=True)
class Splits:
    """Examples ``{"prompt", "answer"}`` to train and to test on."""

    train: list[Example]
    test: list[Example]


def load_examples(task: TaskConfig, seed: int) -> Splits:
    """Read or generate a task's examples.

    Args:
        task: source, column names and the number of examples wanted; a source with fewer gives fewer.
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


def _pick(examples: list[Example], num: int, seed: int) -> list[Example]:
    order = np.random.default_rng(seed).permutation(len(examples))[:num]
    return [examples[i] for i in order]


def _without(train: list[Example], test: list[Example], name: str) -> list[Example]:
    tested = {example["prompt"] for example in test}
    kept = [example for example in train if example["prompt"] not in tested]
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


def _examples(rows: Iterable[Mapping[str, Any]], task: TaskConfig, where: str) -> list[Example]:
    """Check and convert rows; ``where`` names the source in errors."""
    examples = []
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(
                f"{where}: example {i} is a {type(row).__name__}, not an object; write {{...}} per example"
            )
        example = {}
        for key, field in (("prompt", task.prompt_field), ("answer", task.answer_field)):
            if field not in row:
                raise ValueError(
                    f"{where}: example {i} has no column {field!r}, it has {sorted(row)}; "
                    f"set tasks.{task.name}.{key}_field to one of them"
                )
            example[key] = _text(row[field], f"{where}: example {i}, column {field!r}")
        examples.append(example)
    return examples


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return check_characters(value, where)
    if isinstance(value, (int, float, np.number)):
        return str(value)
    raise ValueError(
        f"{where}: {value!r} is neither a string nor a number; convert it to text or drop the example"
    )


def _split_by_hash(examples: list[Example], where: str) -> tuple[list[Example], list[Example]]:
    train: list[Example] = []
    test: list[Example] = []
    for example in examples:
        digest = hashlib.sha256(example["prompt"].encode()).digest()
        (train if int.from_bytes(digest[:8]) % _TEST_ONE_IN else test).append(example)
    if examples and not (train and test):
        raise ValueError(
            f"{where}: {len(examples)} examples are too few to split off a test set by hash; "
            "add examples or give the source a test split of its own"
        )
    return train, test


def _from_path(task: TaskConfig) -> tuple[list[Example], list[Example]]:
    path = Path(str(task.path)).expanduser()
    field = f"tasks.{task.name}.path={task.path!r}"
    if path.is_file() and path.suffix == ".jsonl":
        return _from_jsonl(path, task)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _from_disk(path, task, field)
    if any((path / f"{split}.json").is_file() for split in ("train", "eval", "test")):
        return _from_trace_folder(path, task, field)
    if not path.exists():
        raise ValueError(f"{field}: no such file or folder; fix the path")
    raise ValueError(
        f"{field}: not a .jsonl file, a folder with train.json and test.json, or a folder written by "
        "datasets' save_to_disk; convert it to one of them"
    )


def _from_jsonl(path: Path, task: TaskConfig) -> tuple[list[Example], list[Example]]:
    examples = _examples(read_json_lines(path), task, str(path))
    test_path = path.with_suffix(".test.jsonl")
    if test_path.is_file():
        return examples, _examples(read_json_lines(test_path), task, str(test_path))
    return _split_by_hash(examples, str(path))


def _from_trace_folder(path: Path, task: TaskConfig, field: str) -> tuple[list[Example], list[Example]]:
    """The layout of the TRACE continual-learning benchmark (arXiv 2310.06762); eval.json is not read."""
    parts = []
    for split in ("train", "test"):
        file = path / f"{split}.json"
        if not file.is_file():
            found = sorted(p.name for p in path.glob("*.json"))
            raise ValueError(f"{field}: no {split}.json, the folder has {found}; add the missing split")
        parts.append(_examples(read_json_list(file), task, str(file)))
    return parts[0], parts[1]


def _from_disk(path: Path, task: TaskConfig, field: str) -> tuple[list[Example], list[Example]]:
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # arrow, json and datasets all raise their own kinds for a damaged folder
        raise ValueError(
            f"{field}: cannot be read ({error}); save the dataset again with save_to_disk"
        ) from error
    if isinstance(loaded, datasets.Dataset):
        return _split_by_hash(_examples(_rows(loaded, str(path)), task, str(path)), str(path))
    for split in ("train", "test"):
        if split not in loaded:
            raise ValueError(f"{field}: no split {split!r}, it has {sorted(loaded)}; rename or add the split")
    train, test = (
        _examples(_rows(loaded[split], f"{path}/{split}"), task, f"{path}/{split}")
        for split in ("train", "test")
    )
    return train, test


def _rows(dataset: datasets.Dataset, where: str) -> Iterator[Mapping[str, Any]]:
    for i in range(len(dataset)):
        try:
            yield dataset[i]
        # Arrow keeps what it was given: bytes that were called a string are found out here.
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{where}: example {i}: not UTF-8 ({error.reason}); save the dataset again from clean text"
            ) from None
