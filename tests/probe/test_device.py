"""A probe on a GPU that is not there (``meta``, engine/meta_gpu.py): the proxy is taken to it, what is kept comes back."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from engine.meta_gpu import Count, meta_gpu
from probe.setting import make_batches, make_config, make_model
from torch import Tensor, nn

from trace_dist.config import ProbeConfig
from trace_dist.models.roles import maskable
from trace_dist.probe import warm_start as module_of
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


def test_nothing_but_the_proxy_is_held_when_its_gradients_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what it was, nor its update, nor the moments: what an estimate of memory counts is all that a GPU needs."""
    model, held, summed = make_model(), list[int](), module_of.mean_gradients

    def there() -> dict[int, Tensor]:
        gc.collect()
        found = (each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter) and each.is_meta)
        return {id(each): each for each in found}

    # Other tests' models, which may live as long as the process.
    others = there()

    def watched(*arguments: Any) -> Any:
        held.append(sum(each.numel() for key, each in there().items() if key not in others))
        return summed(*arguments)

    monkeypatch.setattr(learner, "autocast", lambda _: nullcontext())
    # Meta has no fused one.
    unfused = partial(torch.optim.AdamW, foreach=False)
    monkeypatch.setattr(torch.optim, "AdamW", lambda *given, fused, **options: unfused(*given, **options))
    monkeypatch.setattr(module_of, "mean_gradients", watched)
    probe = ProbeConfig(steps=2, fisher_batches=1)
    with meta_gpu(), Count():
        warm_start(model, maskable(model, "linear"), make_batches(), probe, make_config().train)
    own = sum(each.numel() for each in (*model.parameters(), *model.buffers()))
    assert 0 < held[0] <= own
