"""Whoever may take part in the race of training steps trains the same model on the same batch, on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import launch

from trace_dist.benchmarks.contestants import CONTESTANTS, FLOOR, MASKED, TUNED


@pytest.mark.launcher
def test_all_begin_alike_and_learn(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    launch(Path(__file__).with_name("contestants_script.py"), 2, out, launcher="torchrun")
    found = json.loads(out.read_text())
    assert list(found) == list(CONTESTANTS)
    begin = found["full"]["losses"][0]
    for name, contestant in found.items():
        losses = contestant["losses"]
        assert losses[0] == pytest.approx(begin, rel=0.01), name
        assert losses[-1] < losses[0], name
    trained = {name: contestant["num_trained"] for name, contestant in found.items()}
    assert trained[FLOOR] < min(trained[name] for name in CONTESTANTS if name != FLOOR)
    for name in (*MASKED, "LoRA", "SHiRA"):
        assert trained[name] < 0.1 * trained["full"], name
    for name in ("full", "LoRA"):
        assert trained[f"{name}{TUNED}"] == trained[name]
