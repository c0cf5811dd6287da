"""``trace-dist learn``: new tasks into a bank that outlives its runs.

The configuration names the target, the proxy and the new tasks; what is needed of earlier tasks lies in the bank. Each step is
done once: base models, probe, projection, training, delta and signature into the bank. A command that was cut continues.

Started by itself the command starts its steps as ``run`` does. Started by a launcher it learns on the ranks that are there;
what one process does meanwhile (base models, probe) is a process of rank 0's, for which the others wait.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from trace_dist.bank.bank import DeltaBank
from trace_dist.bank.changes import check_view
from trace_dist.bank.writer import read_index
from trace_dist.config import RunConfig
from trace_dist.continual.earlier import check_room_beside
from trace_dist.continual.result import read_result
from trace_dist.masks.mask import Mask
from trace_dist.models.fingerprint import check_same, fingerprint
from trace_dist.stages import base, continual, probe
from trace_dist.stages.display import Display
from trace_dist.stages.pipeline import run_pipeline
from trace_dist.stages.running import Running, failure, start_stage, unfinished
from trace_dist.stages.stage import Stage
from trace_dist.stages.words import next_steps
from trace_dist.utils import dist
from trace_dist.utils.log import get_logger
from trace_dist.utils.together import on_main

logger = get_logger(__name__)
METHOD = "retrieved"
SIGN_OF_LIFE_SECONDS = 20
"""How often waiting ranks hear of rank 0: a collective that nobody joins for minutes times out."""


def as_learned(cfg: RunConfig) -> RunConfig:
    """The configuration of a learning: one method, and the layer and pooling whose representations the bank holds.

    Raises:
        ValueError: the bank is damaged.
    """
    cfg = replace(cfg, continual=replace(cfg.continual, methods=[METHOD]))
    if not cfg.bank_of().index.is_file():
        return cfg
    bank = DeltaBank(cfg.bank_of().root)
    return replace(cfg, bank=replace(cfg.bank, layer=bank.layer, pooling=bank.pooling))


def run_learn(cfg: RunConfig, mask_file: str | None = None) -> None:
    """Learn the tasks of a configuration (``as_learned``) into its bank. Collective.

    Args:
        cfg: the target, the proxy, the new tasks, and the bank.
        mask_file: a mask of the target for the one new task; nothing is probed then.

    Raises:
        ValueError: the bank holds a task of one of the names, or is of another base; or the mask does not fit.
        ProcessFailed: a step failed; its own error is printed above.
    """
    check_new(cfg, mask_file is not None)
    if mask_file is not None:
        _take_mask(cfg, Path(mask_file))
    first, masked = stages_of(cfg, mask_file)
    if dist.world_size() > 1:
        for stage in first:
            _in_one_process(stage, cfg)
        continual.run_continual(cfg)
    else:
        run_pipeline(cfg, [*([stage] for stage in first), [masked]])
    _say(cfg)


def stages_of(cfg: RunConfig, mask_file: str | None = None) -> tuple[list[Stage], Stage]:
    """What one process does first, and the learning."""
    probed = mask_file is None and probe.needs_probe(cfg)
    first = [base.describe(cfg, "target"), *([probe.describe(cfg)] if probed else [])]
    arguments = ["continual", "--continual.methods", f"[{METHOD}]"]
    return first, Stage("learn", arguments, [cfg.folder.method(METHOD)], launched=True)


def check_new(cfg: RunConfig, mask_given: bool) -> None:
    """Raise ValueError where the bank cannot take the tasks; before any long work, and nothing is written. Collective."""
    folder = cfg.bank_of()
    logger.info("learn: %s into the bank %s", ", ".join(task.name for task in cfg.tasks), folder.root)
    logger.info("learn: masks, checkpoints and results lie in %s", cfg.run_dir)
    bank = DeltaBank(folder.root) if on_main(folder.index.is_file) else None
    on_main(lambda: _check_result(cfg, [] if bank is None else bank.tasks))
    if bank is None:
        return
    check_names(cfg, bank)
    check_fits(cfg, bank)
    if not mask_given:
        on_main(lambda: check_room_beside(cfg, bank))


def check_names(cfg: RunConfig, bank: DeltaBank) -> None:
    """Raise ValueError where a bank holds tasks of the same names that were not begun in this run folder. Collective."""
    for task in cfg.tasks:
        # With a mask of its own the task was begun here; `continual.learn` compares mask and examples.
        if task.name in bank.tasks and not on_main(cfg.folder.mask(task.name).is_file):
            raise ValueError(
                f"tasks.name={task.name!r}: the bank {bank.folder} holds a task of this name; rename one "
                f"(`trace-dist bank rename {bank.folder} {task.name} NEW`), or remove it there"
            )


def check_fits(cfg: RunConfig, bank: DeltaBank) -> None:
    """Raise ValueError unless a bank can take what a configuration learns; reads all of the target's weights. Collective."""
    check_view(bank.files, bank.index, cfg.bank.layer, cfg.bank.pooling)
    bank.check_kind(cfg.bank.signature)
    bank.check_dtype(cfg.target.dtype)
    if cfg.bank.representation == "adapted":
        bank.check_adapted()
    # Once, not on each rank.
    on_main(lambda: check_base(cfg, bank))


def _check_result(cfg: RunConfig, held: Collection[str]) -> None:
    """Raise ValueError where the run folder says that tasks were learned which the bank does not hold (any more)."""
    result = cfg.folder.method(METHOD)
    gone = [task.name for task in cfg.tasks if task.name not in held]
    if gone and result.is_file():
        raise ValueError(
            f"run_dir={cfg.run_dir!r}: by {result} its tasks are learned, but the bank {cfg.bank_of().root} holds no "
            f"{', '.join(gone)}; delete {cfg.run_dir} to learn anew, or that file alone to keep its masks"
        )


def check_base(cfg: RunConfig, bank: DeltaBank) -> None:
    """Raise ValueError where the target is there already and is not the bank's base; reads all of its weights."""
    if not cfg.target.made or (Path(cfg.target.path) / "config.json").is_file():
        check_same(bank.base, fingerprint(cfg.target.path), f"bank {bank.folder}")


def _take_mask(cfg: RunConfig, path: Path) -> None:
    """Keep a given mask as that of the one new task.

    Raises:
        ValueError: there are several tasks, the mask is missing, corrupt or of another model, or the task was learned, or begun,
            on another.
    """
    names = [task.name for task in cfg.tasks]
    if len(names) != 1:
        raise ValueError(f"mask_file={str(path)!r}: is for one task, not for {', '.join(names)}; leave one")

    def keep() -> None:
        mask = Mask.load(path)
        # It is taken at whatever density, and of whatever examples, it was made.
        meta = {key: value for key, value in mask.meta.items() if key not in ("density", "examples")}
        mask = replace(mask, meta=meta)
        kept = cfg.folder.mask(names[0])
        if kept.is_file() and Mask.load(kept) == mask:
            return
        bank = cfg.bank_of()
        if bank.index.is_file() and read_index(bank).get(names[0]) is not None:
            raise ValueError(
                f"mask_file={str(path)!r}: the bank {bank.root} holds {names[0]!r}, learned on another mask; leave it out, "
                f"or remove the task there (`trace-dist bank remove`), delete {cfg.run_dir} and learn it anew"
            )
        begun = cfg.folder.checkpoints(METHOD, names[0])
        if kept.is_file() and any(begun.glob("step-*")):
            raise ValueError(
                f"mask_file={str(path)!r}: {names[0]!r} is being learned on another mask; give {kept} to go on with that, or "
                f"delete {begun} to begin anew"
            )
        # A race that was held on another mask is not this one's.
        shutil.rmtree(cfg.folder.progress(METHOD), ignore_errors=True)
        mask.save(kept)

    on_main(keep)


def _in_one_process(stage: Stage, cfg: RunConfig) -> None:
    """Let a process of rank 0's do a stage, unless it is done; all ranks wait. Collective."""
    if on_main(lambda: stage.done):
        return
    running = start_stage(stage, cfg) if dist.is_main() else None
    code = None
    while code is None:
        if running is not None:
            with suppress(subprocess.TimeoutExpired):
                code = running.process.wait(SIGN_OF_LIFE_SECONDS)
        code = dist.broadcast_object(code)
    if running is not None:
        _say_end(running, code)
    lost = None
    if running is not None:
        lost = failure(running, code) if code else unfinished(running)
    if (lost := dist.broadcast_object(lost)) is not None:
        raise lost


def _say_end(running: Running, code: int) -> None:
    with Display([running.stage.name]) as display:
        display.begin(running.stage.name)
        display.show(running.stage.name, running.events.news())
        running.close()
        if code == 0:
            display.end(running.stage.name, running.seconds)
        else:
            running.explain()


def _say(cfg: RunConfig) -> None:
    """What was learned, and what to do next. Collective: every rank opens the bank."""
    bank = DeltaBank(cfg.bank_of().root)
    if not dist.is_main():
        return
    result = read_result(cfg.folder.method(METHOD))
    for task, score in zip(cfg.tasks, result["just_trained"], strict=True):
        logger.info("learned %s: %.1f %% on its test set, answered through the bank", task.name, score)
    retrieval = result["retrieval"]
    logger.info(
        "retrieval: %.1f %% of these test prompts find their task among %d",
        retrieval["accuracy"],
        len(bank.tasks),
    )
    print(next_steps(cfg))
