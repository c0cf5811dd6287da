"""What the stage ``memory`` predicts, beside the states that an optimizer keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine.cases import CASES, batches

from trace_dist import Mask, MaskedAdamW, shard
from trace_dist.config import TrainConfig
from trace_dist.profiling.states import bytes_per_param
from trace_dist.stages.memory import predicted


@pytest.mark.parametrize("granularity", ["element", "row"])
@pytest.mark.parametrize(
    "kept",
    [
        {},
        {"state_dtype": "bfloat16"},
        {"state_dtype": "8bit", "master": False},
        {"offload": "cpu"},
        {"offload": "cpu", "state_dtype": "8bit", "master": False},
    ],
)
def test_predicted_states_are_those_that_are_kept(kept: dict[str, Any], granularity: str) -> None:
    model = shard(CASES["bf16"].model(), "single")
    mask = Mask.random(model, 0.3, granularity, seed=0, maskable="all")
    optimizer = MaskedAdamW(model, mask, lr=1e-3, **kept)
    ids, labels = batches(CASES["bf16"])[0]
    optimizer.model(input_ids=ids, labels=labels).loss.backward()
    optimizer.step()
    num_parameters = sum(torch.Size(model.shape(name)).numel() for name in model.names())
    measured = sum(bytes_per_param(optimizer.model_states(), num_parameters).values())
    found = predicted(mask, TrainConfig(**kept), num_parameters, coded=0, num_copies=1)
    assert found == pytest.approx(measured, rel=0.02)
