"""Banks of version 1: ``bank.json``, ``deltas/<task>.safetensors``, and all signatures in one ``signatures.safetensors``.

They are read as they are. The first change moves them to the present layout (``bank.writer``).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from trace_dist.bank.index import Index, Record
from trace_dist.bank.signature import TENSORS, Signature
from trace_dist.run_folder import BankFolder
from trace_dist.utils.files import corrupt, load_tensors, reading
from trace_dist.utils.names import BASE, check_task_name

KIND = "signatures"


def with_tasks(index: Index, files: BankFolder) -> Index:
    """The index of an old bank with the tasks that its signatures name.

    Raises:
        ValueError: the signatures are damaged, or a task has a name that no task may have.
    """
    if not files.old_signatures.is_file():
        return index
    names = _names(files.old_signatures)
    if BASE in names and files.old_delta(BASE).is_file():
        raise ValueError(
            f"{files.old_delta(BASE)}: a task called {BASE!r}, which is the name of the base model; "
            "delete this file (its prompts are answered by the base model, as they were), and learn the task again"
        )
    return replace(index, records=tuple(map(Record, names)))


def signature(files: BankFolder, task: str) -> Signature:
    """One task's signature.

    Raises:
        ValueError: missing or corrupt.
    """
    path = files.old_signatures
    names = _names(path)
    if task not in names:
        raise corrupt(path, KIND, f"no signature of {task!r}")
    place = names.index(task)
    keys = {name: f"{place}.{name}" for name in TENSORS}
    tensors, _ = load_tensors(path, KIND, list(keys.values()).__contains__)
    with reading(path, KIND):
        parts: dict[str, Any] = {name: tensors[key] for name, key in keys.items()}
        return Signature(task, **parts)


def _names(path: Path) -> list[str]:
    """Tasks with a signature, in order."""
    header: dict[str, Any] = load_tensors(path, KIND, lambda _: False)[1]
    names = header.get("tasks")
    if header.get("version") != 1 or not isinstance(names, list):
        raise corrupt(path, KIND, "its header names no tasks")
    for name in names:
        if name != BASE:
            check_task_name(name, f"{path}: task")
    if len(set(names)) < len(names):
        raise corrupt(path, KIND, "a task occurs twice")
    return names
