"""What a study asks of a model on a GPU that is not there (engine/fake_gpu.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine.fake_gpu import fake_gpu, place
from transformers import LlamaConfig, LlamaForCausalLM

from trace_dist.data.encoding import IGNORE
from trace_dist.studies.heldout import HeldOut, held_out

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
