"""Placements that run models on a GPU that is not there (engine/fake_gpu.py): the scores are those from a CPU, and lie there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine.fake_gpu import OnGpu, fake_gpu, place
from probe.setting import make_model
from projection.test_align import SHAPE, site_for
from torch import Tensor

from trace_dist.projection.placements.align import Options, scores


def aligned(device: str) -> dict[str, Tensor]:
    models: list[Any] = [make_model(**SHAPE), make_model(**{**SHAPE, "hidden_size": 12})]
    for model in models:
        model.set_attn_implementation("eager")
    target, proxy = (place(model, device) for model in models)
    site = site_for(target, proxy, proxy)
    found = scores(site, Options(batches=1))
    return {name: found(name, layout) for name, layout in site.layouts.items()}


def test_activations_of_two_models_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = aligned("cpu")
    with fake_gpu(monkeypatch):
        found = aligned("cuda")
    for name, values in expected.items():
        assert not isinstance(found[name], OnGpu)
        torch.testing.assert_close(found[name], values, rtol=1e-3, atol=1e-6)
