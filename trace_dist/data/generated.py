"""Examples of reasoning-gym, generated once and then read from a cache: some of its datasets take minutes."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from trace_dist.config import TaskConfig
from trace_dist.data.cache import cached
from trace_dist.data.examples import Example
from trace_dist.utils.sealed import read_record, write_record


def derived_seed(seed: int, purpose: str) -> int:
    """An unrelated 31-bit seed per purpose."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:4]) >> 1


def generated(task: TaskConfig, seed: int) -> tuple[list[Example], list[Example]]:
    """Both splits of a task.

    Item i of most datasets is drawn from ``Random(seed + i)``: neighbouring seeds give the same examples, so the two splits take
    unrelated seeds.

    Raises:
        ValueError: reasoning-gym is not installed, does not know the dataset or its options, or has no answers.
    """
    options = dict(task.reasoning_gym or {})
    field, dataset = f"{task.where}.reasoning_gym", options.pop("dataset")
    for key in ("size", "seed"):
        if key in options:
            raise ValueError(
                f"{field}: {key!r} is set by num_train, num_test and the run's seed; remove it here"
            )
    train, test = (
        _split(field, dataset, options, size, derived_seed(seed, split))
        for split, size in (("train", task.num_train), ("test", task.num_test))
    )
    return train, test


def _split(field: str, dataset: str, options: dict[str, Any], size: int, seed: int) -> list[Example]:
    """One split, from the cache if it lies there whole."""
    try:
        package = version("reasoning-gym")
    except PackageNotFoundError:
        package = "none"
    parts = json.dumps([package, dataset, options, size, seed], sort_keys=True, default=str)
    path = cached(hashlib.sha256(parts.encode()).hexdigest()[:32], ".json")
    with suppress(ValueError, LookupError):  # not there, or damaged
        kept: list[Example] = read_record(path, "delete it")["examples"]
        return kept
    examples = _generate(field, dataset, options, size, seed)
    write_record(path, {"made from": parts, "examples": examples})
    return examples


def _generate(field: str, dataset: str, options: dict[str, Any], size: int, seed: int) -> list[Example]:
    try:
        import reasoning_gym  # an optional extra
    except ImportError:
        raise ValueError(
            f"{field}: the package reasoning_gym is not installed; "
            "install the extra with: pip install 'trace-dist[eval]'"
        ) from None
    try:
        made = reasoning_gym.create_dataset(dataset, size=size, seed=seed, **options)
        rows = [made[i] for i in range(size)]
    except (TypeError, ValueError, AssertionError, LookupError) as error:
        raise ValueError(
            f"{field}: {dataset!r} with {options}: {error}; check its name and options"
        ) from error
    if any(row["answer"] is None for row in rows):
        raise ValueError(
            f"{field}: {dataset!r} has no reference answer for some questions, only a verifier; "
            "choose a dataset that states its answers"
        )
    return [{"prompt": str(row["question"]), "answer": str(row["answer"])} for row in rows]
