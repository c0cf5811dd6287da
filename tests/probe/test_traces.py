"""What a trace says of its making: one that was made otherwise is made again."""

from __future__ import annotations

from pathlib import Path

import torch

from trace_dist.bank.sketch import sketch_update
from trace_dist.config import ProbeConfig
from trace_dist.probe.task import Probed, Tensors


def test_a_trace_of_other_examples_is_made_again(tmp_path: Path) -> None:
    """Also where they lie under the same path; a trace of an earlier release says nothing of them."""
    trace, sketch, probe = tmp_path / "t.safetensors", tmp_path / "s.safetensors", ProbeConfig()
    whole = Tensors({"w": 0.5}, {"w": [2, 3]})
    probed = Probed({"w": torch.ones(2)}, sketch_update({"w": torch.ones(5)}, 0, "m"), [(1, 0.5)], whole)
    probed.save(trace, sketch, probe, "these")
    assert Probed.load(trace, sketch, "m", probe, "these") is not None
    assert Probed.load(trace, sketch, "m", probe, "others") is None
    assert Probed.load(trace, sketch, "m", ProbeConfig(lr=0.5), "these") is None
    probed.save(trace, sketch, probe)
    assert Probed.load(trace, sketch, "m", probe, "others") is not None
