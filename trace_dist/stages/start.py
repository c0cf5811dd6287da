"""How a command on a run begins: its parts exist, the ranks have met and agree, the folder is theirs and fits."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from trace_dist.bank.writer import check_newest, check_own, read_index
from trace_dist.config import RunConfig
from trace_dist.launching import run_holders
from trace_dist.parts import PLACEMENTS, SCORES
from trace_dist.stages.changes import at_home, completed, differing_fields, forbidden
from trace_dist.utils import activity, dist
from trace_dist.utils.agreement import agree
from trace_dist.utils.env import code_version
from trace_dist.utils.files import reading, write_text
from trace_dist.utils.heartbeat import Patience
from trace_dist.utils.imports import importing
from trace_dist.utils.launch import adopt_launch, job_size
from trace_dist.utils.locks import hold_until_exit
from trace_dist.utils.log import get_logger
from trace_dist.utils.shared_files import check_shared
from trace_dist.utils.together import on_main
from trace_dist.utils.yaml import dump_yaml, load_yaml

logger = get_logger(__name__)
IN_ONE_PROCESS = ("run", "probe")
"""Commands that refuse several ranks: ``run`` starts its own, and the proxy is small."""
STARTS_STAGES = ("run", "learn", "consolidate")
"""Commands that start others, unless a launcher started them."""
ON_ALL_RANKS = ("project", "train", "continual", "eval", "memory measure")
"""Commands that work on as many ranks as the configuration asks for."""
FILL_BANKS, FILLS = ("run", "learn", "continual"), "retrieved"
"""Commands that learn tasks into a bank, and the method by which they do."""
MAKES_MASKS = ("run", "learn", "probe")
"""Commands with which the making of masks begins."""


def start(cfg: RunConfig, command: str, **own: str | None) -> None:
    """Join the job, hold the run folder until this process ends, and write the configuration beside the results.

    Args:
        cfg: the configuration of this command.
        command: its name.
        own: its arguments beside the configuration.

    Raises:
        ValueError: on every rank: a part or an option that does not exist, too many or too few ranks, ranks that were
            started differently, a folder in which another process is at work, or one that holds results of another
            configuration.
    """
    if command in IN_ONE_PROCESS and adopt_launch() > 1:
        raise ValueError(
            f"{command}: works in one process, but {adopt_launch()} ranks were started; start one"
        )
    activity.begin(command)
    launch = cfg.launch
    patience = Patience(launch.silence_seconds, launch.stuck_minutes)
    dist.init_distributed(dist.Waiting(patience, launch.timeout_minutes))
    _check_number_of_ranks(cfg, command)
    if dist.world_size() > 1:
        agree({"command": command, "code": code_version(), **own, **dict(_flat(asdict(cfg)))})
    on_main(lambda: take_folder(cfg))
    if command in FILL_BANKS:
        on_main(lambda: take_bank(cfg))
    check_shared(cfg.folder.lock, f"run_dir={cfg.run_dir!r}")
    if command in FILL_BANKS:
        _check_bank_is_shared(cfg)
    # After that, since it imports the parts, which takes seconds, and a folder that is taken is refused at once.
    check_parts(cfg)
    if cfg.train.sequence_parallel > 1:
        on_main(lambda: _check_shared_rows(cfg))
    if command in MAKES_MASKS and own.get("mask_file") is None:
        on_main(lambda: _check_masks(cfg))
    on_main(lambda: keep_config(cfg, whole_run=command in STARTS_STAGES))


def check_start(cfg: RunConfig, command: str, mask_given: bool = False) -> None:
    """Raise ``ValueError`` where ``start`` would, but for what other processes hold; nothing is held or written."""
    _check_number_of_ranks(cfg, command)
    check_parts(cfg)
    if cfg.train.sequence_parallel > 1:
        _check_shared_rows(cfg)
    if command in MAKES_MASKS and not mask_given:
        _check_masks(cfg)
    _check_results(cfg, changed(cfg))


def check_parts(cfg: RunConfig) -> None:
    """Raise ``ValueError`` where the drop-in parts or their options do not exist or do not fit."""
    with importing():
        from trace_dist.continual.driver import check_methods
        from trace_dist.continual.isolation.base import load_isolation
        from trace_dist.continual.starts.base import load_start
        from trace_dist.projection.project import needs_proxy
        from trace_dist.train.metric_log import check_trackers
        from trace_dist.train.schedule import check_schedule

    _check_score(cfg)
    cfg = cfg.largest
    placement = PLACEMENTS.load(cfg.projection.placement)
    options = PLACEMENTS.options(cfg.projection.placement, cfg.projection.options)
    # Otherwise nothing is placed: the target is probed itself, or whole tensors take the proxy's scores.
    places = not needs_proxy(cfg.projection) or (cfg.proxy is not None and cfg.mask.granularity != "tensor")
    if places and hasattr(placement, "check_mask"):
        placement.check_mask(options, cfg.mask)
    load_isolation(cfg.mask).check(cfg.mask, len(cfg.tasks))
    load_start(cfg.bank)
    check_methods(cfg)
    check_schedule(cfg.train)
    check_trackers(cfg.train.trackers)


def _check_shared_rows(cfg: RunConfig) -> None:
    with importing():
        from trace_dist.stages.shapes import check_shared_rows

    check_shared_rows(cfg)


def _check_masks(cfg: RunConfig) -> None:
    with importing():
        from trace_dist.stages.shapes import check_masks

    check_masks(cfg)


def _check_score(cfg: RunConfig) -> None:
    """Raise ``ValueError`` where the score cannot be read from the probe."""
    score, name = SCORES.load(cfg.probe.score), cfg.probe.score
    if cfg.probe.num_steps(1) == 0 and getattr(score, "uses_update", True):
        raise ValueError(
            f"probe.steps=0: probe.score={name!r} reads the update of a warm start, and there is none; raise probe.steps, or "
            "choose a score of gradients, such as fisher"
        )
    if hasattr(score, "contrast") and len(cfg.tasks) + len(cfg.general) < 2:
        raise ValueError(
            f"probe.score={name!r}: compares the task with others, and there are none; add a general set or a task"
        )
    least = getattr(score, "least_batches", 1)
    if cfg.probe.fisher_batches < least:
        raise ValueError(
            f"probe.fisher_batches={cfg.probe.fisher_batches}: probe.score={name!r} needs at least {least}; raise it"
        )


def take_folder(cfg: RunConfig) -> None:
    """Hold the run folder until this process ends; the stages of a run share what their run holds.

    Raises:
        ValueError: another process holds it, or nothing can be written there.
    """
    hold_until_exit(cfg.folder.lock, f"run_dir={cfg.run_dir!r}", run_holders())


def take_bank(cfg: RunConfig) -> None:
    """Hold the bank that this command fills until this process ends: masks are made beside the tasks that it holds now.

    Raises:
        ValueError: another process fills or changes it, its index is damaged or older than its files, its tasks are those of
            another bank, or nothing can be written there.
    """
    if FILLS in cfg.continual.methods:
        bank = cfg.bank_of()
        hold_until_exit(bank.command_lock, f"bank.path={str(bank.root)!r}", run_holders())
        if bank.index.is_file():
            check_own(bank)
            check_newest(bank, read_index(bank))


def _check_bank_is_shared(cfg: RunConfig) -> None:
    """A bank outside of the run folder, which ``take_bank`` has taken, is seen by ranks on all hosts. Collective."""
    bank = cfg.bank_of()
    if FILLS in cfg.continual.methods and not bank.root.is_relative_to(cfg.folder.root):
        check_shared(bank.command_lock, f"bank.path={str(bank.root)!r}")


def _check_number_of_ranks(cfg: RunConfig, command: str) -> None:
    found, asked = dist.world_size(), cfg.launch.num_ranks
    if cfg.backend == "single" and found > 1:
        raise ValueError(
            f"backend='single': {found} ranks were started; set --backend zero3, or start one process"
        )
    size = cfg.train.sequence_parallel
    starts = command in STARTS_STAGES
    ranks = asked if starts and found == 1 else found
    if (starts or command in ON_ALL_RANKS) and ranks % size:
        raise ValueError(
            f"train.sequence_parallel={size}: must divide the number of ranks, and {command} works on {ranks}; start it with a "
            f"launcher on a multiple of {size}, set --launch.num_ranks, or use 1"
        )
    on_ranks = command in ON_ALL_RANKS or (starts and found > 1)
    if not on_ranks or cfg.backend == "single":
        return
    if found < asked:
        raise ValueError(
            f"launch.num_ranks={asked}: {command} was started on {found}; start it with a launcher, for example "
            f"`deepspeed --num_gpus {asked} --module trace_dist {command} ...`, or set --launch.num_ranks {found}"
        )
    if found < job_size() and "RANK" not in os.environ:
        raise ValueError(
            f"SLURM_NTASKS={job_size()}: {command} was started as one process, not by srun; start it with srun or another "
            "launcher, or set --backend single for one process"
        )


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted name, value) of every field of nested dictionaries and lists."""
    if isinstance(value, dict | list) and value:
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(part, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def keep_config(cfg: RunConfig, whole_run: bool) -> None:
    """Write ``config.yaml``; a stage leaves one alone that differs in how the run is carried out alone.

    Raises:
        ValueError: there are results made with other values.
    """
    folder, present, differing = cfg.folder, _plain(cfg), list[str]()
    if folder.config.is_file():
        kept, here, differing = _kept(cfg)
        _check_results(cfg, differing)
        written = present if differing or whole_run else here
    else:
        kept, written = None, present
    if written != kept or whole_run:
        write_text(folder.config, dump_yaml(written))
    if not folder.mark.is_file() or folder.mark.read_text(encoding="utf-8") != cfg.run_dir:
        write_text(folder.mark, cfg.run_dir)
    if differing:
        logger.info("%s: changed %s; no result there depends on it", cfg.run_dir, ", ".join(differing))


def changed(cfg: RunConfig) -> list[str]:
    """Names of the fields whose values differ from those that the run folder has kept, but for how a run is carried out."""
    return _kept(cfg)[2] if cfg.folder.config.is_file() else []


def _plain(cfg: RunConfig) -> dict[str, Any]:
    """A configuration as JSON holds it."""
    return json.loads(json.dumps(asdict(cfg)))  # type: ignore[no-any-return]


def _kept(cfg: RunConfig) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The configuration that the folder has kept, the same with this one's words for places, and the fields that differ."""
    path, present = cfg.folder.config, _plain(cfg)
    kept = _read_yaml(path)
    with reading(path, "configuration"):
        kept = completed(kept, cfg)
        here = at_home(kept, present, Path(kept["run_dir"]), Path(cfg.run_dir))
        return kept, here, differing_fields(here, present)


def _check_results(cfg: RunConfig, differing: list[str]) -> None:
    refused = forbidden(cfg, differing)
    if refused:
        results = sorted({result for found in refused.values() for result in found})
        shown = ", ".join(results[:3]) + (f" and {len(results) - 3} more" if len(results) > 3 else "")
        raise ValueError(
            f"run_dir={cfg.run_dir!r}: it holds results ({shown}) made with other values of {', '.join(refused)}; "
            "choose another run_dir, or delete this one"
        )


def _read_yaml(path: Path) -> dict[str, Any]:
    """The kept configuration.

    Raises:
        ValueError: it is damaged.
    """
    try:
        kept = load_yaml(path.read_text(encoding="utf-8"))
        if not isinstance(kept, dict) or not isinstance(kept.get("run_dir"), str):
            raise yaml.YAMLError("it names no run_dir")
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read ({reason}); restore it or delete the run folder") from None
    return kept
