"""The driver: it lets each method learn the tasks in order, scores them after each, and goes on where a run was cut.

[Note: going on] After each task the driver keeps scores, facts and the method's state (``progress``), and deletes the task's
checkpoints. A run that was cut loads the state after its last finished task and learns the next one, whose training goes on from
its newest checkpoint. On the same number of ranks the result is the uninterrupted one bit for bit.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_dist.config import RunConfig
from trace_dist.continual.density import with_density
from trace_dist.continual.masks import masks_made_with
from trace_dist.continual.methods.base import Method
from trace_dist.continual.progress import Progress, examples_digest, keep_trained
from trace_dist.continual.race import held_race, kept_race
from trace_dist.continual.result import read_result, result_of
from trace_dist.continual.setting import Setting
from trace_dist.parts import METHODS
from trace_dist.run_folder import RunFolder
from trace_dist.utils import dist
from trace_dist.utils.files import write_json
from trace_dist.utils.log import get_logger, outcome
from trace_dist.utils.together import on_main

logger = get_logger(__name__)


@dataclass(frozen=True)
class Entry:
    """One method of a run: its name, its class, its options."""

    name: str
    kind: type[Method]
    options: Any


def method_class(name: str) -> type[Method]:
    """The class behind a method's name.

    Raises:
        ValueError: no method has this name, or the module of that path holds none.
    """
    return METHODS.subclass(name, "METHOD", Method)  # type: ignore[type-abstract]


def check_methods(cfg: RunConfig) -> list[Entry]:
    """The methods of a run with their options, checked before any work starts.

    Raises:
        ValueError: no such method or option, or this run cannot use it.
    """
    options = {name: METHODS.options(name, values) for name, values in cfg.continual.options.items()}
    entries = []
    for name in cfg.continual.methods:
        kind = method_class(name)
        kind.check(name, cfg)
        entry = Entry(name, kind, options.get(name, METHODS.options(name)))
        if kind.races(entry.options, cfg) and kind.trial is Method.trial:
            raise ValueError(
                f"continual.methods={name!r}: has no trial, so its learning rate cannot race; "
                "give train.lr as a number, and `lr: auto` as an option of each method that shall race"
            )
        entries.append(entry)
    return entries


def run_continual(cfg: RunConfig) -> None:
    """Learn the tasks with each of ``cfg.continual.methods`` that has no result yet. Collective.

    Raises:
        ValueError: as ``check_methods``; or a method of one process is asked of several ranks.
    """
    folder = cfg.folder
    wanted = []
    for entry in check_methods(cfg):
        if _has_result(folder.method(entry.name)):
            logger.info("%s: kept the result %s", entry.name, folder.method(entry.name))
            _drop_leftovers(folder, entry.name)
        else:
            wanted.append(entry)
    alone = [entry.name for entry in wanted if not entry.kind.on_ranks]
    if alone and dist.world_size() > 1:
        raise ValueError(f"continual.methods={alone}: they run in one process; start them without a launcher")
    if wanted:
        setting = with_density(Setting.load(cfg))
        if dist.is_main():
            write_json(folder.tasks, _describe_tasks(setting))
        for entry in wanted:
            run_method(setting, entry)


def _has_result(path: Path) -> bool:
    """Whether a method's result is there. Collective.

    Raises:
        ValueError: it is damaged.
    """
    return on_main(lambda: path.is_file() and bool(read_result(path)))


def run_method(setting: Setting, entry: Entry) -> None:
    """Learn all tasks of a run with one method, as far as that was not done before, and write its result. Collective.

    Raises:
        ValueError: what was done before is damaged or was made with other options, or as the method does.
    """
    folder, name = setting.folder, entry.name
    method = entry.kind(name, setting, entry.options)
    about = {
        "model": setting.fingerprint,
        "examples": examples_digest([*setting.bench.tasks, *setting.bench.general]),
        **_made_with(method),
    }
    progress = Progress(folder.progress(name), about)
    streams = setting.bench.tasks[len(progress.record.tasks) :]
    _drop_checkpoints(folder, name, progress.record.tasks)
    if progress.record.tasks:
        # Also after the last one: what the method has made of them is still to be kept.
        method.load_state(progress.state)
        logger.info("%s: going on after %s", name, ", ".join(progress.record.tasks))
    elif not progress.record.rows:
        progress.begin(method.score())
    race(method, entry, going_on=bool(progress.record.tasks))
    for stream in streams:
        task = stream.task.name
        keep_trained(progress.folder, task, method.learn(stream))
        progress.finish(task, method.score(), method.lr_trained_with, method.facts(), method.state)
        _drop_checkpoints(folder, name, [task])
    _keep_product(method)
    method.close()
    result = result_of(method, progress)
    on_main(lambda: write_json(folder.method(name), result))
    _drop_leftovers(folder, name)
    outcome(f"{name}: {' / '.join(f'{score:.1f}' for score in progress.record.rows[-1].tasks)} %")


def race(method: Method, entry: Entry, going_on: bool = False) -> None:
    """Let a method's learning rate race where it is ``auto``. Collective.

    Args:
        method: the method.
        entry: of the run.
        going_on: it has finished tasks, which it trained with the rate that won then; that one stays.

    Raises:
        ValueError: that race is missing or damaged, or as ``held_race``.
    """
    setting, kind = method.setting, entry.kind
    if not kind.races(entry.options, setting.cfg):
        return
    if going_on:
        method.race = kept_race(setting, method.name)
        return
    streams = setting.bench.tasks[: setting.cfg.race.tasks]
    # Around the rate that won with the density, where that was raced for.
    grid = setting.grid if kind.masked else None
    about = {**masks_made_with(setting.cfg), **_made_with(method)}
    method.race = held_race(setting, method.name, streams, method.trial, method.continues, grid, about)


def _made_with(method: Method) -> dict[str, Any]:
    """A method's options but for its rate, and what else its result is made of."""
    options = {} if method.options is None else vars(method.options)
    return {"options": {key: value for key, value in options.items() if key != "lr"}, **method.made_of()}


def _keep_product(method: Method) -> None:
    """Write what a method has made of the tasks, where that is one set of weights."""
    product, path = method.product(), method.setting.folder.product(method.name)
    if product is not None:
        on_main(lambda: product.save(path))
        logger.info("%s: its weights are %s, a delta against the base", method.name, path)


def _drop_checkpoints(folder: RunFolder, name: str, tasks: list[str]) -> None:
    """Delete the checkpoints of finished tasks."""
    if dist.is_main():
        for task in tasks:
            shutil.rmtree(folder.checkpoints(name, task), ignore_errors=True)
    dist.barrier()


def _drop_leftovers(folder: RunFolder, name: str) -> None:
    """Delete what only an unfinished method needs."""
    if dist.is_main():
        for path in (folder.progress(name), folder.checkpoints(name)):
            shutil.rmtree(path, ignore_errors=True)
    dist.barrier()


def _describe_tasks(setting: Setting) -> dict[str, Any]:
    """The tasks' trivial baselines."""
    tasks = [stream.task for stream in setting.bench.tasks]
    return {
        "majority": [task.majority_percent for task in tasks],
        "train_test_overlap": [task.overlap_percent for task in tasks],
        "num_train": [len(task.train) for task in tasks],
        "num_test": [len(task.test) for task in tasks],
    }
