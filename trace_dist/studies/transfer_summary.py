"""What the trainings of the study of composition say together ([Note: steps to a loss] in studies/transfer.py).

Means and intervals are those of Student's t over seeds, where there are several; a seed's value is its mean over tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trace_dist.studies.images import interval

Record = Mapping[str, Any]


def steps_to(looks: Sequence[Sequence[float]], loss: float) -> int | None:
    """Steps up to the first look at or below a loss; None where there is none."""
    return next((int(step) for step, found in looks if found <= loss), None)


def compared(base: Record, composed: Record, half: Record | None = None) -> dict[str, Any]:
    """The arms of one task and seed.

    Returns:
        Steps of ``base`` and ``composed`` to the loss with which ``base`` ends, those before training among them; ``reached``,
        whether ``composed`` comes there, and its ``share`` of the steps of ``base`` (of all its steps where it does not); test
        losses, and how far they lie above that of ``base``, in percent; whether earlier deltas were taken.
    """
    target = base["looks"][-1][1]
    alone = steps_to(base["looks"], target)
    found = steps_to(composed["looks"], target)
    steps = composed["fit_steps"] + (composed["steps"] if found is None else found)
    if alone is None:
        raise AssertionError(f"{base['task']}: its last look lies above itself")
    return {
        "base_steps": alone,
        "composed_steps": steps,
        "reached": found is not None,
        "share": steps / alone,
        "composed_above": 100 * (composed["test_loss"] / base["test_loss"] - 1),
        "base_loss": base["test_loss"],
        "composed_loss": composed["test_loss"],
        "used": bool(composed["composition"].get("used")),
    } | ({} if half is None else _in_half(base, half))


def _in_half(base: Record, half: Record) -> dict[str, float]:
    return {"half_loss": half["test_loss"], "half_above": 100 * (half["test_loss"] / base["test_loss"] - 1)}


NUMBERS = (
    "share", "composed_above", "half_above", "base_steps", "composed_steps", "base_loss", "composed_loss", "half_loss",
)  # fmt: skip


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """By group: its tasks, and all of them together. Tasks and seeds that lack ``base`` or ``composed`` are left out."""
    arms: dict[tuple[str, str, int], dict[str, Record]] = {}
    for record in records:
        arms.setdefault((record["group"], record["task"], record["seed"]), {})[record["arm"]] = record
    whole = {key: compared(**found) for key, found in arms.items() if {"base", "composed"} <= found.keys()}
    result: dict[str, Any] = {}
    for group in dict.fromkeys(group for group, _, _ in whole):
        mine = {(task, seed): found for (of, task, seed), found in whole.items() if of == group}
        tasks = dict.fromkeys(task for task, _ in mine)
        result[group] = {
            "tasks": {
                name: _over_seeds({key: each for key, each in mine.items() if key[0] == name})
                for name in tasks
            },
            "all": _over_seeds(mine),
        }
    return result


def _over_seeds(found: Mapping[tuple[str, int], Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and interval of each number that all have, and how often earlier deltas were taken and the loss was reached."""
    seeds = dict.fromkeys(seed for _, seed in found)
    numbers = {
        key: interval(
            [float(np.mean([each[key] for (_, of), each in found.items() if of == seed])) for seed in seeds]
        )
        for key in NUMBERS
        if all(key in each for each in found.values())
    }
    counts = {key: sum(each[key] for each in found.values()) for key in ("used", "reached")}
    return numbers | counts | {"trainings": len(found), "seeds": len(seeds)}
