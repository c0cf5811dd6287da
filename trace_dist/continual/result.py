"""A method's result: its scores, what its trainings measured, and what the report needs to draw it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trace_dist.continual.methods.base import Method
from trace_dist.continual.metrics import summarise
from trace_dist.continual.progress import Progress, examples_digest
from trace_dist.train.loop import TrainResult
from trace_dist.utils.env import run_info
from trace_dist.utils.files import read_json

PARTS: dict[str, type] = {"R": list, "general_names": list, "just_trained": list, "measured": dict}
"""What every result has."""


def read_result(path: Path) -> dict[str, Any]:
    """A method's result.

    Raises:
        ValueError: missing or damaged.
    """
    result = read_json(path)
    if problem := _problem(result):
        raise ValueError(f"{path}: damaged ({problem}); delete it and start `trace-dist continual` again")
    return result  # type: ignore[no-any-return]


def _problem(result: Any) -> str | None:
    """What no result is like."""
    for part, kind in PARTS.items():
        if not isinstance(result, dict) or not isinstance(result.get(part), kind):
            return f"{part} is missing or no {kind.__name__}"
    for part in ("date", "commit"):
        if not isinstance(result["measured"].get(part), str | None):
            return f"measured.{part} is no text"
    try:
        json.dumps(result, allow_nan=False)
    except ValueError:
        return "a number is infinite or NaN"
    return None


def result_of(method: Method, progress: Progress) -> dict[str, Any]:
    """What ``methods/<name>.json`` holds, from the progress of a method whose tasks are all finished."""
    record, judge, bench = progress.record, method.setting.judge, method.setting.bench
    trained = dict(zip(record.tasks, progress.trained(), strict=True))
    timed = [result.step_ms for result in trained.values() if result.losses]
    return {
        "label": method.label,
        "colour": method.colour,
        "masked": method.masked,
        "on_ranks": method.on_ranks,
        "options": {} if method.options is None else asdict(method.options),
        "lr": method.lr_trained_with,
        "lr_by_task": record.rates,
        "rates": [] if method.race is None else method.race.to_json(),
        **summarise(
            [row.tasks for row in record.rows],
            [row.general for row in record.rows] if judge.general_names else None,
        ),
        "per_example": record.rows[-1].per_example,
        "general_names": judge.general_names,
        "bits_per_byte": {
            name: [row.bits_per_byte[i] for row in record.rows] for i, name in enumerate(judge.text_names)
        },
        **_looks(trained),
        "losses": {task: thinned(result.losses) for task, result in trained.items()},
        "step_ms": sum(timed) / len(timed) if timed else 0.0,
        "seconds": sum(result.seconds for result in trained.values()),
        "examples": {
            stream.task.name: examples_digest([stream]) for stream in (*bench.tasks, *bench.general)
        },
        "measured": run_info(),
        **record.facts,
    }


def _looks(trained: Mapping[str, TrainResult]) -> dict[str, Any]:
    """Looks at the validation examples, and the steps whose values were kept; nothing of tasks without any."""
    looked = {task: result for task, result in trained.items() if result.looks}
    if not looked:
        return {}
    return {
        "validation": {task: [list(look) for look in result.looks] for task, result in looked.items()},
        "kept_steps": {task: result.kept_step for task, result in looked.items()},
    }


def thinned(curve: list[tuple[int, float]], points: int = 100) -> list[tuple[int, float]]:
    """At most about ``points`` points of a curve, the last one among them; none of a task that another run trained."""
    stride = max(1, -(-len(curve) // points))
    return curve[::-1][::stride][::-1]
