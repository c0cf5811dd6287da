"""Two ranks and one bank: rank 0 writes, all see the same, and what fails on one fails on all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bank.samples import adapted_bank, base_model, prompts_of, represent_rows
from launching import launch

from trace_dist import DeltaBank
from trace_dist.bank.adapted import retrieve_adapted
from trace_dist.bank.blend import blended
from trace_dist.bank.verify import verify
from trace_dist.utils.sealed import tensors_checksum

SCRIPT = Path(__file__).with_name("rank_script.py")


@pytest.mark.launcher
def test_two_ranks(tmp_path: Path) -> None:
    launch(SCRIPT, 2, tmp_path / "bank", tmp_path, launcher="torchrun")
    reports = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for report in reports:
        assert (report["tasks"], report["generation"]) == (["one", "real"], 2)
        assert "already, with another signature" in report["differs"]
        assert "not for bbbb; choose another folder" in report["foreign"]
        assert "no such delta file" in report["activated"]
        assert report["reloaded"] == [["one", "real"], 2]
        assert report["again"] == "activated"
        assert report["retrieved"] == ["one"]
        assert report["removed"] == [["one"], 3]
    assert verify(DeltaBank(tmp_path / "bank")) == []
    # Retrieval by the tasks' own weights: as in one process.
    model = base_model()
    prompts = [prompt for task in range(2) for prompt in prompts_of(task, 5, seed=50)]
    bank = adapted_bank(tmp_path / "alone", model, 2)
    base = represent_rows(model, prompts)(range(10))
    alone = retrieve_adapted(bank, model, base, represent_rows(model, prompts), candidates=2)
    assert len(set(alone)) == 2
    assert [report["adapted"] for report in reports] == [alone] * 2
    # And one set of weights for all of these prompts.
    blend = blended(bank, model, base)
    assert blend is not None
    assert [report["blend"] for report in reports] == [tensors_checksum(blend.values)] * 2
