"""A probe on a GPU that is not there (``meta``, engine/meta_gpu.py): the proxy is taken to it, what is kept comes back."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from engine.meta_gpu import Count, meta_gpu
from probe.setting import make_batches, make_config, make_model

from trace_dist.config import ProbeConfig
from trace_dist.models.roles import maskable
from trace_dist.probe.warm_start import warm_start
from trace_dist.train import learner


def test_a_warm_start_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are made on the device, with every operand there; evidence is kept on the CPU."""
    model = make_model()
    monkeypatch.setattr(learner, "autocast", lambda _: nullcontext())  # meta has none
    probe = ProbeConfig(steps=0, fisher_batches=2)  # torch's fused AdamW does not take meta
    with meta_gpu(), Count():
        trace = warm_start(model, maskable(model, "linear"), make_batches(), probe, make_config().train)
    assert all(parameter.is_meta for parameter in model.parameters())
    kept = ("weight", "update", "gradient", "fisher")
    tensors = [getattr(each, name) for each in trace.evidence.values() for name in kept]
    assert tensors
    assert not any(tensor.is_meta for tensor in tensors)
