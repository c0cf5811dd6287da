"""Stage ``continual``: the tasks one after the other, by some methods; a method whose result is there is kept."""

from __future__ import annotations

from collections.abc import Sequence

from trace_dist.config import RunConfig
from trace_dist.continual.driver import method_class
from trace_dist.continual.driver import run_continual as run_methods
from trace_dist.continual.result import read_result
from trace_dist.stages.base import prepare_base
from trace_dist.stages.project import describe as describe_project
from trace_dist.stages.stage import ALONE, Stage


def runs_on_ranks(cfg: RunConfig, method: str) -> bool:
    """Whether a method starts under the launcher: where it can, unless the configuration wants one process."""
    return method_class(method).on_ranks and method not in cfg.launch.single_process


def projects(methods: Sequence[str]) -> bool:
    """Whether one of some methods trains the run's masks, and so has them projected."""
    kinds = [method_class(method) for method in methods]
    return any(kind.masked and not kind.own_masks for kind in kinds)


def describe(cfg: RunConfig, methods: Sequence[str]) -> Stage:
    """Some methods; those on all ranks are one stage, which projects the masks that they need first.

    Raises:
        ValueError: the result of one is damaged.
    """
    launched = all(runs_on_ranks(cfg, method) for method in methods)
    project = describe_project(cfg)
    arguments = ["continual", "--continual.methods", "[" + ",".join(methods) + "]"]
    results = [cfg.folder.method(method) for method in methods]
    for path in results:
        if path.is_file():
            read_result(path)
    if not launched:
        return Stage(" ".join(methods), [*arguments, *ALONE], results)
    if not projects(methods):
        return Stage(" ".join(methods), arguments, results, launched=True)
    return Stage(
        " ".join(["project", *methods]), arguments, [*project.outputs, *results], project.inputs, True
    )


def run_continual(cfg: RunConfig) -> None:
    """Run the methods that have no result yet. Collective.

    Raises:
        ValueError: a method that runs in one process is asked of several ranks.
    """
    prepare_base(cfg, "target")
    run_methods(cfg)
