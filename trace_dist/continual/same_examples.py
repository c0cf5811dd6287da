"""Whether the results in a run folder were made of the examples that the run's paths hold now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from trace_dist.config import RunConfig
from trace_dist.continual.progress import digest_of
from trace_dist.continual.result import read_result
from trace_dist.data.tasks import load_task
from trace_dist.utils.files import load_tensors
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)


def check_examples(cfg: RunConfig) -> None:
    """Raise ValueError where results of a run are of other examples than its paths hold now. On one rank.

    Examples are read where there are results that say which ones they were made of, which those of earlier releases do not.
    """
    made = list(_made_of(cfg))
    if not made:
        return
    try:
        present = _digests(cfg)
    except ValueError as error:
        logger.warning(
            "%s: keeps its results, but their examples cannot be read any more: %s", cfg.run_dir, error
        )
        return
    for path, digests in made:
        changed = [name for name, digest in digests.items() if present.get(name, digest) != digest]
        if changed:
            (where,) = (each.where for each in (*cfg.tasks, *cfg.general) if each.name == changed[0])
            raise ValueError(
                f"{where}: its examples are others than {path} was made of, under the same path; put them back, or "
                f"choose another run_dir, or delete {cfg.run_dir} to begin anew"
            )


def _digests(cfg: RunConfig) -> dict[str, str]:
    """Task or general set -> digest of its examples."""
    tasks = [load_task(task, cfg.seed, validate=cfg.train.eval_every > 0) for task in cfg.tasks]
    tasks += [load_task(task, cfg.seed) for task in cfg.general]
    return {task.name: digest_of([task]) for task in tasks}


def _made_of(cfg: RunConfig) -> Iterator[tuple[Path, Mapping[str, str]]]:
    """Results, and the digests of the examples that each was made of."""
    folder = cfg.folder
    for method in cfg.continual.methods:
        path = folder.method(method)
        if path.is_file() and (found := read_result(path).get("examples")):
            yield path, found
    # A probe that was cut is gone on with, and looks at its traces itself.
    probed = folder.specificity.is_file()
    for task in (task.name for task in cfg.tasks):
        for path, kind in ((folder.mask(task), "mask"), (folder.trace(task), "trace")):
            if path.is_file() and (kind == "mask" or probed):
                _, header = load_tensors(path, kind, lambda _: False)
                found = header.get("meta", {}) if kind == "mask" else header
                if isinstance(digest := found.get("examples"), str):
                    yield path, {task: digest}
