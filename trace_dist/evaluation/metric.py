"""The metric of a task, by its name or as a function of the user's own.

A function is named by its import path, ``my_pkg.my_metric``, and is called as a metric's ``score`` (evaluation/metrics):

    def my_metric(said: str, references: list[str], prompt: str) -> float: ...  # in [0, 1]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from numbers import Real
from types import ModuleType
from typing import Any

from trace_dist.data.examples import question_of, references_of
from trace_dist.data.tasks import Task
from trace_dist.parts import METRICS

Compare = Callable[[str, Sequence[str], str], float]
"""What the model said, the references and the question -> score in [0, 1]."""
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Metric:
    """A metric with its options.

    Attributes:
        compare: of a metric of generated answers; None of one that generates nothing.
        module: that holds it; None of a function.
    """

    compare: Compare | None
    module: Any


def load_metric(task: Task) -> Metric:
    """The metric of a task.

    Raises:
        ValueError: there is no such metric or function, its package is not installed, or its options are not known.
    """
    name, field = task.metric, f"{task.where}.metric={task.metric!r}"
    function = None if name in METRICS else _function(name, field)
    if function is not None:
        if task.metric_options:
            raise ValueError(
                f"{task.where}.metric_options={task.metric_options!r}: {name} is a function and has none; drop them"
            )
        return Metric(partial(_checked, function, field), None)
    module = METRICS.load(name)
    _check_module(module, field)
    options = METRICS.options(name, task.metric_options)
    if hasattr(module, "evaluate"):
        return Metric(None, module)
    extra = {} if options is None else {"options": options}
    return Metric(partial(_checked, partial(module.score, **extra), field), module)


def check_metric(task: Task) -> None:
    """Load a task's metric and, where it compares answers, try it on the first reference.

    Raises:
        ValueError: as ``load_metric``, or it fails.
    """
    compare = load_metric(task).compare
    if compare is not None:
        row = task.test[0]
        compare(row["answer"], references_of(row), question_of(row["prompt"]))


def _function(name: str, field: str) -> Callable[..., Any] | None:
    """The function of an import path; None where the path is a module's."""
    home, _, last = name.rpartition(".")
    try:
        if not hasattr(import_module(home), last):
            import_module(name)
        found = getattr(import_module(home), last)
    # A module of the user's may raise anything while it is imported.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{field}: cannot be imported ({reason}); check the path and PYTHONPATH") from error
    return found if callable(found) else None


def _check_module(module: ModuleType, field: str) -> None:
    package = getattr(module, "requires", None)
    if package is not None and find_spec(package) is None:
        raise ValueError(
            f"{field}: the package {package} is not installed; install the extra with: pip install 'trace-dist[metrics]'"
        )
    if not hasattr(module, "score") and not hasattr(module, "evaluate"):
        raise ValueError(f"{field}: the module has no function score; write one, or name a function of it")


def _checked(
    compare: Callable[..., Any], field: str, said: str, references: Sequence[str], prompt: str
) -> float:
    """The score of one example, which is a number in [0, 1]."""
    try:
        value = compare(said, list(references), prompt)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{field}: fails on {said[:80]!r} ({reason}); mend it") from error
    # Sums of many shares may round to a little more than 1.
    if not isinstance(value, Real) or not -_ROUNDING <= float(value) <= 1 + _ROUNDING:
        raise ValueError(f"{field}: gives {value!r} for {said[:80]!r}, not a number in [0, 1]; mend it")
    return min(1.0, max(0.0, float(value)))
