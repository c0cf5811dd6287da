"""``trace-dist consolidate``: a bank, with all that was ever learned into it, becomes one set of weights that the bank teaches.

The configuration is that of one of its tasks; the result is scored on the tasks that the configuration names. What is made lies
in ``<run_dir>/consolidate``. A command that was cut continues; after the bank has changed it begins anew.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trace_dist.bank.bank import BASE, DeltaBank
from trace_dist.bank.index import Record
from trace_dist.config import RunConfig
from trace_dist.config.how_it_runs import decisive
from trace_dist.continual.driver import check_methods, race
from trace_dist.continual.methods.base import Method
from trace_dist.continual.result import thinned
from trace_dist.continual.setting import Setting
from trace_dist.run_folder import DELTA, PROMPTS, RECIPE
from trace_dist.stages.learn import check_base
from trace_dist.stages.pipeline import run_pipeline
from trace_dist.stages.stage import Stage
from trace_dist.stages.words import fold_steps
from trace_dist.utils import dist
from trace_dist.utils.env import run_info
from trace_dist.utils.files import read_json, write_json
from trace_dist.utils.log import get_logger
from trace_dist.utils.together import on_main

logger = get_logger(__name__)
METHOD = "consolidated"
FOLDER = "consolidate"
"""Of what is made, in the run folder."""


def as_consolidated(cfg: RunConfig) -> RunConfig:
    """The configuration of a folding: one method, a folder of its own, the bank's layer and pooling. One that is that stays.

    Raises:
        ValueError: there is no bank, or it is damaged.
    """
    root, folder = cfg.bank_of().root, Path(cfg.run_dir)
    # A run may have that name, too.
    is_folding = folder.name == FOLDER and cfg.continual.methods == [METHOD] and cfg.bank.path is not None
    bank = DeltaBank(root)
    return replace(
        cfg,
        run_dir=str(folder if is_folding else folder / FOLDER),
        bank=replace(cfg.bank, path=str(root), layer=bank.layer, pooling=bank.pooling),
        continual=replace(cfg.continual, methods=[METHOD]),
    )


def run_consolidate(cfg: RunConfig) -> dict[str, float]:
    """Fold the bank of a configuration (``as_consolidated``), on the ranks that are there or that it asks for. Collective.

    Returns:
        Task or general set -> score in percent, or in bits per byte.

    Raises:
        ValueError: the bank does not hold the configuration's tasks, keeps no prompts, or is of another base.
        ProcessFailed: it failed on the ranks that were started; its own error is printed above.
    """
    result = cfg.folder.product(METHOD).with_suffix(".json")
    bank = DeltaBank(cfg.bank_of().root)
    # Before anything older is forgotten.
    bank.check_dtype(cfg.target.dtype)
    on_main(lambda: check_base(cfg, bank))
    on_main(lambda: _begin(cfg, bank, result))
    if on_main(result.is_file):
        logger.info("consolidate: kept %s; the bank is as it was", cfg.folder.product(METHOD))
    elif dist.world_size() == 1 and cfg.backend != "single" and cfg.launch.num_ranks > 1:
        run_pipeline(cfg, [[Stage("consolidate", ["consolidate"], [result], launched=True)]])
    else:
        _fold(cfg, bank, result)
    scores: dict[str, float] = on_main(lambda: read_json(result))["scores"]
    return scores


def next_step(cfg: RunConfig) -> str:
    """What to do with the result, as a command to copy."""
    return fold_steps(cfg, METHOD)


def _begin(cfg: RunConfig, bank: DeltaBank, result: Path) -> None:
    """Forget what was made of a bank, or with options, that were others."""
    path = cfg.folder.progress(METHOD) / "made_of.json"
    sections = ("tasks", "general", "data", "train", "race", "eval", "seed")
    about = decisive(
        {
            **{section: asdict(cfg)[section] for section in sections},
            "options": cfg.continual.options.get(METHOD, {}),
            "bank": {record.name: dict(record.facts) for record in bank.index.records},
            "files": {record.name: _taught_by(record) for record in bank.index.records},
        }
    )
    # A record of an earlier release does not say which files they were.
    if path.is_file() and {"files": about["files"]} | decisive(read_json(path)) == about:
        write_json(path, about)
        if not cfg.folder.product(METHOD).is_file():
            result.unlink(missing_ok=True)
        return
    for stale in (cfg.folder.checkpoints(METHOD), path.parent):
        shutil.rmtree(stale, ignore_errors=True)
    for stale in (result, cfg.folder.product(METHOD)):
        stale.unlink(missing_ok=True)
    write_json(path, about)


def _taught_by(record: Record) -> dict[str, str]:
    """Checksums of what a task's teacher is made of, and of what it is asked."""
    files = record.files
    return {file: files[file].sha256 for file in (DELTA, RECIPE, PROMPTS) if file in files}


def _fold(cfg: RunConfig, bank: DeltaBank, result: Path) -> None:
    """Train, score, and write the delta and what is to be said of it. Collective."""
    (entry,) = check_methods(cfg)
    setting = Setting.load(cfg)
    method = entry.kind(METHOD, setting, entry.options)
    race(method, entry)
    before = setting.base_row
    trained = method.learn(setting.bench.tasks[-1])
    judge = setting.judge
    found = {
        "tasks": [name for name in bank.tasks if name != BASE],
        "base": judge.named(before),
        "scores": judge.named(method.score()),
        **_about(method),
        "losses": thinned(trained.losses),
        "run_info": run_info(),
    }
    product = method.product()
    if product is None:
        raise AssertionError("consolidate: nothing was made")

    def write() -> None:
        product.save(cfg.folder.product(METHOD))
        write_json(result, found)
        shutil.rmtree(cfg.folder.checkpoints(METHOD), ignore_errors=True)

    on_main(write)


def _about(method: Method) -> dict[str, Any]:
    """How it was made, JSON-ready."""
    rates = method.race.to_json() if method.race is not None else []
    return {"lr": method.lr, "rates": rates, **method.facts()}
