"""Commands ``train`` and ``eval``: one task, or one model."""

from __future__ import annotations

from pathlib import Path

from trace_dist.bank.bank import DeltaBank
from trace_dist.bank.delta import check_base, extract_delta
from trace_dist.config import RunConfig
from trace_dist.continual.judge import Judge, Row
from trace_dist.masks.format import Mask
from trace_dist.models.fingerprint import check_same, fingerprint
from trace_dist.probe.project import mask_path
from trace_dist.train.bases import load_target, prepare_base
from trace_dist.train.loop import MetricLog
from trace_dist.train.task import train_mask
from trace_dist.train.workbench import Workbench
from trace_dist.utils import dist
from trace_dist.utils.files import write_json
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)


def run_train(cfg: RunConfig, task_name: str | None, mask_file: str | None) -> Path:
    """Train one task's mask and write ``<run_dir>/deltas/<task>.safetensors``. Collective.

    Args:
        cfg: the run.
        task_name: which task; the first when None.
        mask_file: its mask; the run's projected mask when None.

    Raises:
        ValueError: no such task, or the mask is missing, corrupt or of another model.
    """
    names = [task.name for task in cfg.tasks]
    name = task_name or names[0]
    if name not in names:
        raise ValueError(f"task_name={name!r}: not among the tasks {', '.join(names)}; name one of them")
    source = Path(mask_file) if mask_file else mask_path(cfg, name)
    mask = Mask.load(source)  # before a base is made
    path = prepare_base(cfg.target, cfg, "target")
    model_id = fingerprint(path)
    check_base(mask, model_id, str(source))
    bench = Workbench.load(cfg, path)
    stream = bench.tasks[names.index(name)]
    model = load_target(cfg, path)
    log = MetricLog(Path(cfg.run_dir), f"train/{name}")
    checkpoints = Path(cfg.run_dir) / "checkpoints" / "train" / name if cfg.train.checkpoint_every else None
    batches = bench.batches([stream], cfg.train.batch_size)
    train_mask(
        model,
        mask,
        batches,
        cfg.train,
        stream.steps,
        description=f"train/{name}",
        log=log,
        checkpoints=checkpoints,
    )
    log.close()
    delta = extract_delta(model, mask.with_meta(model=model_id), name)
    out = Path(cfg.run_dir) / "deltas" / f"{name}.safetensors"
    if dist.is_main():
        delta.save(out)
    dist.barrier()
    logger.info("%s: %d entries, %.2f MiB", out, mask.num_entries, delta.nbytes / 2**20)
    return out


def run_eval(cfg: RunConfig, folder: str | None) -> dict[str, float]:
    """Score the target, plain or with retrieval from a bank; writes ``<run_dir>/eval.json``. Collective.

    Raises:
        ValueError: the bank is missing or of another base model.
    """
    path = prepare_base(cfg.target, cfg, "target")
    bank = None if folder is None else DeltaBank(folder)
    if bank is not None:
        check_same(bank.base, fingerprint(path), f"bank {folder}")
    bench = Workbench.load(cfg, path)
    model = load_target(cfg, path)
    judge = Judge(cfg, bench)
    row: Row = judge.score(model.module) if bank is None else judge.score_retrieved(model, bank)
    names = [task.name for task in cfg.tasks] + judge.general_names + judge.text_names
    scores = dict(zip(names, [*row.tasks, *row.general, *row.bits_per_byte], strict=True))
    if dist.is_main():
        write_json(Path(cfg.run_dir) / "eval.json", {"bank": folder, "scores": scores})
    return scores
