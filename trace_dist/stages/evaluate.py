"""Stage ``evaluate``: scores of the target, as it is or with the deltas of a bank."""

from __future__ import annotations

from collections import Counter

from trace_dist.bank.bank import DeltaBank
from trace_dist.bank.learned_on import warn_of_others
from trace_dist.config import RunConfig
from trace_dist.continual.setting import Setting
from trace_dist.models.fingerprint import check_same
from trace_dist.stages.base import prepare_base
from trace_dist.utils import dist
from trace_dist.utils.files import write_json


def run_evaluate(cfg: RunConfig, bank_folder: str | None) -> dict[str, float]:
    """Score the target, plain or with retrieval from a bank; writes ``eval.json``, with a bank also how many prompts of
    each set every delta (or ``base``) answered. Collective.

    Returns:
        Task or general set -> score in percent, or in bits per byte.

    Raises:
        ValueError: the bank is missing, or of another base model or data type.
    """
    # Before a base is made and data are read, which may take long.
    bank = None if bank_folder is None else DeltaBank(bank_folder)
    if bank is not None:
        bank.check_dtype(cfg.target.dtype)
        warn_of_others(bank, cfg.target.quantize)
        if cfg.bank.representation == "adapted":
            bank.check_adapted()
    prepare_base(cfg, "target")
    setting = Setting.load(cfg)
    if bank is not None:
        check_same(bank.base, setting.fingerprint, f"bank {bank_folder}")
    judge = setting.judge
    row = setting.base_row if bank is None else judge.score_retrieved(setting.model, bank)
    routes = {} if bank is None else judge.routes(setting.model, bank)
    scores = judge.named(row)
    if dist.is_main():
        answered = {name: dict(Counter(found)) for name, found in routes.items()}
        write_json(cfg.folder.scores, {"bank": bank_folder, "scores": scores, "answered_by": answered})
    return scores
