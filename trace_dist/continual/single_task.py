"""Commands ``train`` and ``eval``: one task, or one model."""

from __future__ import annotations

from pathlib import Path

from trace_dist.bank.bank import DeltaBank
from trace_dist.bank.delta import check_base, extract_delta
from trace_dist.config import RunConfig
from trace_dist.continual.learn import train_stream
from trace_dist.continual.setting import Setting
from trace_dist.masks.format import Mask
from trace_dist.models.fingerprint import check_same
from trace_dist.probe.project import mask_path
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
    setting = Setting.load(cfg)
    check_base(mask, setting.fingerprint, str(source))
    stream = setting.bench.tasks[names.index(name)]
    batches = setting.bench.batches([stream], cfg.train.batch_size)
    train_stream(setting, stream, mask, batches, name="train")
    delta = extract_delta(setting.model, mask.with_meta(model=setting.fingerprint), name)
    out = setting.folder.delta(name)
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
    setting = Setting.load(cfg)
    bank = None if folder is None else DeltaBank(folder)
    if bank is not None:
        check_same(bank.base, setting.fingerprint, f"bank {folder}")
    judge = setting.judge
    row = setting.base_row if bank is None else judge.score_retrieved(setting.model, bank)
    names = [task.name for task in cfg.tasks] + judge.general_names + judge.text_names
    scores = dict(zip(names, [*row.tasks, *row.general, *row.bits_per_byte], strict=True))
    if dist.is_main():
        write_json(setting.folder.scores, {"bank": folder, "scores": scores})
    return scores
