"""What a study asks of a model on a GPU that is not there (engine/fake_gpu.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from engine.fake_gpu import OnGpu, fake_gpu, place
from studies.small import Setup
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from trace_dist.data.encoding import IGNORE
from trace_dist.probe.importance import Evidence, Trace
from trace_dist.studies import probes
from trace_dist.studies.arms.align import Align
from trace_dist.studies.heldout import HeldOut, held_out
from trace_dist.studies.lab import Case, Lab
from trace_dist.utils import dist

ROWS = [
    {"input_ids": [2, 3, 4 + i][: 2 + i % 2], "labels": [IGNORE, 3, 4 + i][: 2 + i % 2]} for i in range(5)
]


def scores(device: str) -> HeldOut:
    torch.manual_seed(0)
    shape = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    model: Any = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, attn_implementation="eager"))
    return held_out(place(model.eval(), device).forward, ROWS, pad_id=0, batch_size=2)


def test_held_out_examples_go_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = scores("cpu")
    with fake_gpu(monkeypatch):
        found = scores("cuda")
    assert found.nats == pytest.approx(expected.nats, rel=1e-5)
    assert (found.right, found.tokens) == (expected.right, expected.tokens)


def is_there(module: nn.Module) -> bool:
    (found,) = {isinstance(parameter, OnGpu) for parameter in module.parameters()}
    return found


def test_what_is_probed_leaves_the_device(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second copy of the target, and the proxy: trainings that follow have the room. Each is there while it is read."""
    cfg = replace(setup.cfg, target=replace(setup.cfg.target, dtype="bfloat16"))
    case, where = Case("first", 0), list[bool]()

    def warm_start(module: nn.Module, names: list[str], *_: Any) -> Trace:
        module.to(dist.local_device())
        nothing = {name: torch.zeros(module.get_parameter(name).shape) for name in names}
        evidence = {name: Evidence(each, each, each, each) for name, each in nothing.items()}
        return Trace(evidence, [(1, 1.0)])

    def scores(site: Any, _: Any) -> Any:
        where.append(is_there(site.shown.module))
        return lambda name, layout: torch.arange(layout.num_units, dtype=torch.float32)

    monkeypatch.setattr(probes, "warm_start", warm_start)
    monkeypatch.setattr("trace_dist.projection.placements.align.scores", scores)
    with fake_gpu(monkeypatch):
        lab = Lab(cfg, setup.study)
        for module in (lab.dense, lab.small.module):
            module.set_attn_implementation("eager")  # type: ignore[operator]
        found = probes.Probes(lab)
        found.target(case)
        found.proxy(case)
        assert not is_there(lab.dense)
        assert not is_there(lab.small.module)
        Align("align", lab, found).masks(case)
        assert where == [True]
        assert not is_there(lab.small.module)
        assert is_there(lab.model.module)
