"""Stage ``train``: one task's mask is trained from the base, and its delta kept."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

from trace_dist.bank.delta import check_base, extract_delta
from trace_dist.checkpoint import check_mask
from trace_dist.config import RunConfig
from trace_dist.config.checks import AUTO
from trace_dist.continual.density import with_density
from trace_dist.continual.learn import train_stream, try_rate
from trace_dist.continual.race import held_race
from trace_dist.continual.setting import Setting
from trace_dist.masks.mask import Mask
from trace_dist.stages.base import prepare_base
from trace_dist.train.workbench import Stream
from trace_dist.utils import dist
from trace_dist.utils.log import get_logger
from trace_dist.utils.together import on_main

logger = get_logger(__name__)


def run_train(cfg: RunConfig, task_name: str | None, mask_file: str | None) -> Path:
    """Train one task's mask and write its delta into the run folder. Collective.

    Args:
        cfg: the run.
        task_name: which task; the first when None.
        mask_file: its mask; the run's projected mask when None.

    Returns:
        The delta's file.

    Raises:
        ValueError: no such task, or the mask is missing, corrupt or of another model.
    """
    names = [task.name for task in cfg.tasks]
    name = task_name or names[0]
    if name not in names:
        raise ValueError(f"task_name={name!r}: not among the tasks {', '.join(names)}; name one of them")
    source = Path(mask_file) if mask_file else cfg.folder.mask(name)
    # Read before a base is made, which may take long.
    mask = Mask.load(source)
    on_main(lambda: check_mask(cfg.folder.checkpoints("train", name), mask))
    prepare_base(cfg, "target")
    setting = Setting.load(cfg)
    if mask_file is None:
        # The mask was made at a density that has raced, or with a number; one that is given has its own.
        setting = with_density(setting)
    check_base(mask, setting.fingerprint, str(source))
    stream = setting.bench.tasks[names.index(name)]
    batches = setting.bench.batches([stream], cfg.train.batch_size)
    train_stream(setting, stream, mask, batches, name="train", lr=_won(setting, stream, mask))
    delta = extract_delta(setting.model, mask.with_meta(model=setting.fingerprint), name)
    out = cfg.folder.delta(name)
    if dist.is_main():
        delta.save(out)
        # Another mask of this task begins anew.
        shutil.rmtree(cfg.folder.checkpoints("train", name), ignore_errors=True)
    dist.barrier()
    logger.info("%s: %d entries, %.2f MiB", out, mask.num_entries, delta.nbytes / 2**20)
    return out


def _won(setting: Setting, stream: Stream, mask: Mask) -> float | None:
    """The learning rate that won this task's race; None where none is held."""
    if setting.cfg.train.lr != AUTO:
        return None
    trial, about = partial(try_rate, setting, mask, name="train"), {"mask": mask.digest()}
    return held_race(setting, "train", [stream], trial, grid=setting.grid, about=about).lr
