"""Read a run's `results.json` and give it typed, complete shapes.

Every drawing function of the report works on a `RunView`: scores are float arrays in percent, and whatever
a run did not measure (absent key, null, NaN, an interrupted sequence) is NaN. So a panel decides once whether
it has something to show, and no panel can break the page.

[Note: the accuracy matrix]
`scores[t, i]` is the score on task i after training on task t; row 0 is the untouched base model, so the
matrix has one row more than columns. `scores[i + 1, i]` is task i *just trained*, the last row is *final*.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trace_dist.run_folder import RunFolder

Array = NDArray[np.float64]

OLD_METHODS = {
    "retrieved": ("retrieved", "blue", True),
    "merged": ("merged", "sky", True),
    "full": ("full fine-tuning", "vermillion", False),
    "lora": ("LoRA", "pink", False),
    "random": ("random mask", "grey", True),
}
"""Label, colour and whether a mask is trained, where a file of an earlier version does not say it."""
SAME_SIZE = 0.1
"""Share by which the density of a mask may differ from that of the one whose memory was measured."""


@dataclass(frozen=True)
class MethodView:
    """One way of learning the sequence: its accuracy matrix and the numbers derived from it."""

    name: str
    label: str
    colour: str  # role in the palette (`theme.LIGHT`); one that is not there gets a spare one
    masked: bool  # its model states are those of masked training
    scores: Array  # [num_tasks + 1, num_tasks], percent; see [Note: the accuracy matrix]
    general: Array  # [num_tasks + 1, num_general], percent
    just_trained: Array  # [num_tasks], percent
    losses: Mapping[str, Array]  # task -> [num_points, 2] of (step, loss in nats per token)
    looks: Mapping[str, Array]  # task -> [num_looks, 3] of (step, validation loss, score in percent)
    kept_steps: Mapping[str, float]  # task -> step whose values its training left, where it looked
    rates: Sequence[float]  # peak learning rates that raced, rising; none where the rate was given
    stats: Mapping[str, float]  # the scalar entries of the method; read them with `stat`

    @property
    def final(self) -> Array:
        """[num_tasks] percent: the last row that was measured."""
        measured = np.flatnonzero(np.isfinite(self.scores).any(axis=1))
        return self.scores[measured[-1]] if measured.size else self.scores[-1]

    def stat(self, key: str) -> float:
        """The scalar `key` of this method, NaN if the run did not report it."""
        return self.stats.get(key, math.nan)


@dataclass(frozen=True)
class MaskView:
    """Where one task's mask lies in one model."""

    roles: list[str]
    density: Array  # [num_layers, num_roles], fraction in [0, 1]


@dataclass(frozen=True)
class RunView:
    """A whole run; `raw` keeps the parts that are shown as they are (config, versions)."""

    tasks: list[str]
    general_sets: list[str]
    methods: list[MethodView]
    masks: Mapping[str, Mapping[str, MaskView]]  # "proxy" | "target" -> task -> mask
    raw: Mapping[str, Any]

    @property
    def hero(self) -> MethodView:
        """The method the run is about: retrieved, else merged, else the first."""
        by_name = {method.name: method for method in self.methods}
        return by_name.get("retrieved") or by_name.get("merged") or self.methods[0]

    def method(self, name: str) -> MethodView | None:
        return next((method for method in self.methods if method.name == name), None)

    @property
    def commits(self) -> dict[str, list[str]]:
        """Commit -> labels of the methods that it measured; no labels where one commit measured the whole run."""
        found: dict[str, list[str]] = {}
        for method in self.methods:
            measured = mapping(mapping(mapping(self.raw.get("modes")).get(method.name)).get("measured"))
            if measured.get("commit"):
                found.setdefault(str(measured["commit"]), []).append(method.label)
        whole = self.part("run_info").get("commit")
        if not found and whole:  # files of an earlier version name it once
            found[str(whole)] = []
        return found if len(found) > 1 else {commit: [] for commit in found}

    def part(self, name: str) -> Mapping[str, Any]:
        """The optional object `name` of the results, empty if absent or of another type."""
        value = self.raw.get(name)
        return value if isinstance(value, Mapping) else {}

    def bytes_per_param(self, name: str) -> float:
        """Measured model-state bytes per parameter of a method, NaN if unknown; those of a mask hold for masks of its size."""
        memory, method = self.part("memory"), self.method(name)
        measured = mapping(memory.get("bytes_per_param"))
        fallback = None
        if method is not None and method.masked:
            size, of = method.stat("density"), number(memory.get("density"))
            fallback = None if abs(size - of) > SAME_SIZE * of else measured.get("masked")
        return number(measured.get(name, fallback))


def load_results(path: str | Path) -> dict[str, Any]:
    """Read `results.json`, given the file or the run folder that holds it.

    Raises:
        ValueError: the file is missing, is not JSON, or is not an object.
    """
    path = Path(path)
    path = RunFolder.of(path).results if path.is_dir() else path
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ValueError(f"results file {path}: {reason}; pass a run folder or its results.json") from error
    # A JSON or a UTF-8 decoding error, or JSON that is nested too deeply.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"results file {path}: not valid JSON ({error}); run the sequence again") from error
    if not isinstance(results, dict):
        raise ValueError(
            f"results file {path}: holds a {type(results).__name__}, must be an object with 'tasks' and "
            "'modes'; pass the results.json of a run"
        )
    return results


def parse_results(results: Mapping[str, Any]) -> RunView:
    """Check the required fields and give every optional one a shape.

    Raises:
        ValueError: "tasks" or "modes" is missing or empty, or a matrix does not fit the tasks.
    """
    for field in ("tasks", "modes"):
        if not results.get(field):
            raise ValueError(
                f"results: field {field!r} is missing or empty; "
                "pass the results.json that a run or continual run wrote"
            )
    tasks = [str(task) for task in sequence(results["tasks"])]
    general_sets = [str(name) for name in sequence(results.get("general"))]
    if not tasks:
        raise ValueError("results: field 'tasks' must be a list of names; run the sequence again")
    if not isinstance(results["modes"], Mapping):
        raise ValueError("results: field 'modes' must map names to results; run the sequence again")
    methods = [
        _parse_method(str(name), mapping(method), tasks, general_sets)
        for name, method in results["modes"].items()
    ]
    masks = {
        model: {
            str(task): view for task, mask in mapping(by_task).items() if (view := _parse_mask(mapping(mask)))
        }
        for model, by_task in mapping(results.get("masks")).items()
    }
    return RunView(tasks, general_sets, methods, masks, results)


def _parse_method(
    name: str, method: Mapping[str, Any], tasks: list[str], general_sets: list[str]
) -> MethodView:
    num_stages = len(tasks) + 1
    where = f"results: modes.{name}"
    scores = matrix(method.get("R"), num_stages, len(tasks), f"{where}.R")
    general_rows = method.get("general") if general_sets else None  # scores without names cannot be shown
    general = matrix(general_rows, num_stages, len(general_sets), f"{where}.general")
    just_trained = matrix([method.get("just_trained") or []], 1, len(tasks), f"{where}.just_trained")[0]
    diagonal = np.diagonal(scores, offset=-1)
    losses = {str(task): _parse_curve(curve) for task, curve in mapping(method.get("losses")).items()}
    looks = {str(task): _parse_looks(found) for task, found in mapping(method.get("validation")).items()}
    label, colour, masked = OLD_METHODS.get(name, (name, "", False))
    return MethodView(
        name=name,
        label=str(method.get("label", label)),
        colour=str(method.get("colour", colour)),
        masked=bool(method.get("masked", masked)),
        scores=scores,
        general=general,
        just_trained=np.where(np.isfinite(just_trained), just_trained, diagonal),
        rates=sorted(number(mapping(rate).get("lr")) for rate in sequence(method.get("rates"))),
        losses={task: curve for task, curve in losses.items() if len(curve)},
        looks={task: found for task, found in looks.items() if len(found)},
        kept_steps={str(task): number(step) for task, step in mapping(method.get("kept_steps")).items()},
        stats={key: number(value) for key, value in method.items() if isinstance(value, (int, float))},
    )


def _parse_curve(curve: Any) -> Array:
    """[num_points, 2] from points (step, loss, ...) or {"step", "loss"}."""
    pairs = [
        (p.get("step"), p.get("loss")) if isinstance(p, Mapping) else sequence(p)[:2] for p in sequence(curve)
    ]
    points = [(number(pair[0]), number(pair[1])) for pair in pairs if len(pair) == 2]
    array = np.array(points, dtype=np.float64).reshape(-1, 2)
    return array[np.isfinite(array).all(axis=1)]


def _parse_looks(looks: Any) -> Array:
    """Those with a step and a loss; a score that was not measured is NaN."""
    rows = [
        [number(value) for value in [*sequence(look)[:3], None, None, None][:3]] for look in sequence(looks)
    ]
    array = np.array(rows, dtype=np.float64).reshape(-1, 3)
    return array[np.isfinite(array[:, :2]).all(axis=1)]


def _parse_mask(mask: Mapping[str, Any]) -> MaskView | None:
    roles = [str(role) for role in sequence(mask.get("roles"))]
    rows = sequence(mask.get("density"))
    if not roles or not rows:
        return None
    return MaskView(roles, matrix(rows, len(rows), len(roles), "results: masks.density"))


def matrix(rows: Any, num_rows: int, num_cols: int, where: str) -> Array:
    """[num_rows, num_cols] float64 from nested lists; what is missing is NaN, what is too much an error."""
    out = np.full((num_rows, num_cols), math.nan)
    rows = sequence(rows)
    widest = max((len(sequence(row)) for row in rows), default=0)
    if len(rows) > num_rows or widest > num_cols:
        raise ValueError(
            f"{where}: {len(rows)} x {widest} values, must be at most {num_rows} x {num_cols}; "
            "check that the list of tasks belongs to these results"
        )
    for r, row in enumerate(rows):
        for c, value in enumerate(sequence(row)):
            out[r, c] = number(value)
    return out


def mapping(value: Any) -> Mapping[str, Any]:
    """`value` if it is an object, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def sequence(value: Any) -> Sequence[Any]:
    """`value` if it is a list, else an empty one."""
    return value if isinstance(value, (list, tuple)) else []


def number(value: Any) -> float:
    """`value` as a finite float, NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    # A whole number beyond all floats.
    except OverflowError:
        return math.nan


def mean(values: Array) -> float:
    """Mean of the measured values, NaN (without a warning) if there are none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(np.nanmean(values)) if values.size else math.nan
