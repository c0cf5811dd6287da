"""Images under ZeRO-3 on two ranks: the losses, scores and routes of one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from launching import launch
from modality.rank_script import METHODS
from modality.small import make_config

from trace_dist.bank.bank import DeltaBank
from trace_dist.config import RunConfig
from trace_dist.masks import Mask

pytestmark = pytest.mark.launcher


def test_two_ranks_learn_what_one_learns(run: RunConfig) -> None:
    folder = Path(run.run_dir).parent
    shutil.copytree(run.folder.root / "probe", folder / "ranks" / "probe")
    launch(Path(__file__).with_name("rank_script.py"), 2, folder, launcher="deepspeed")
    two = make_config(folder, METHODS, "ranks")
    one_bank, two_bank = (DeltaBank(cfg.bank_of().root) for cfg in (run, two))
    for task in (each.name for each in run.tasks):
        assert Mask.load(two.folder.mask(task, "projected")) == Mask.load(run.folder.mask(task, "projected"))
        assert one_bank.mask(task) == two_bank.mask(task)
    for method in METHODS:
        one, found = (json.loads(cfg.folder.method(method).read_text()) for cfg in (run, two))
        assert found["R"] == one["R"]
        for task, curve in one["losses"].items():
            assert found["losses"][task] == [[step, pytest.approx(loss, rel=1e-4)] for step, loss in curve]
    retrieval = [json.loads(cfg.folder.method("retrieved").read_text())["retrieval"] for cfg in (run, two)]
    assert retrieval[0]["confusion"] == retrieval[1]["confusion"]
