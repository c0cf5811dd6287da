"""What a task may be called: its name becomes the name of files and the key of tables."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

BASE = "base"
"""Stands for the base model wherever tasks are listed: prompts like the general sets are answered by it."""

AUTO = "auto"
"""Stands for the task that each prompt retrieves, wherever one is asked for by name."""

RESERVED = frozenset({BASE})
MAX_BYTES = 150
"""A file name has 255 bytes; suffixes and temporary names take their part."""


def check_task_name(name: object, field: str = "tasks.name") -> None:
    """Refuse a name that is reserved or could not be the name of a file.

    Args:
        name: any value; what was read from a file may be of any type.
        field: begins the message.

    Raises:
        ValueError: it is no name of a task.
    """
    rule = _broken_rule(name)
    if rule is not None:
        raise ValueError(f"{field}={name!r:.200}: {rule}; rename the task")


def check_new_name(name: object, field: str = "tasks.name") -> None:
    """As ``check_task_name``, for a task that is yet to be learned or named; earlier releases gave names that are refused now.

    Raises:
        ValueError: it is no name of a task, or nobody could ask for the task by it.
    """
    check_task_name(name, field)
    if name == AUTO:
        raise ValueError(f"{field}={name!r}: stands for the task that each prompt retrieves; rename the task")


def check_distinct(names: Iterable[str], field: str = "tasks.name") -> None:
    """Raise ValueError where two names are the same file on a file system that knows no case."""
    taken: dict[str, str] = {}
    for name in names:
        key = _seen(name)
        if key in taken:
            raise ValueError(
                f"{field}={name!r}: names must be unique, and some file systems do not tell it from {taken[key]!r}; "
                "rename one"
            )
        taken[key] = name


def _seen(name: str) -> str:
    """Letters of another width or case look the same to a reader and to some file systems."""
    return unicodedata.normalize("NFKC", name).casefold().strip()


def _broken_rule(name: object) -> str | None:
    if not isinstance(name, str) or not name:
        return "must be a non-empty text"
    if any(unicodedata.category(letter).startswith("C") for letter in name):
        return "must not hold control characters"
    if name != name.strip() or name.startswith(".") or "/" in name or "\\" in name:
        return "must not hold '/' or '\\', begin with '.', or begin or end with a space"
    if len(name.encode()) > MAX_BYTES:
        return f"must have at most {MAX_BYTES} bytes"
    if _seen(name) in RESERVED:
        return "is reserved for the base model"
    return None
