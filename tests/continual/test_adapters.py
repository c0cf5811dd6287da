"""Adapters that are put into a model, and what it answers from then on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trace_dist.continual.methods.lora import LoRA
from trace_dist.train.loss import autocast


class OneLayer(LoRA):
    """Of which all weights are adapters."""

    def __init__(self) -> None:
        self.layer = nn.Linear(4, 4, bias=False)

    def trained(self) -> Any:
        return dict(self.layer.named_parameters())


def test_mixed_precision_sees_adapters_that_are_put_in_between() -> None:
    """Within its block it keeps the weights that it has rounded; each task's adapters have their own answers."""
    method, x, found = OneLayer(), torch.ones(1, 4), []
    with autocast("bfloat16"), torch.no_grad():
        for value in (1.0, 2.0):
            method.put({"weight": torch.full((4, 4), value)})
            found.append(method.layer(x)[0, 0].item())
    assert found == [4.0, 8.0]
