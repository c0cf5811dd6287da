"""Names and models without ``torch.compile``, DDP and checkpoint wrappers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from trace_dist.models.nf4 import named_weights, quantize_nf4
from trace_dist.models.wrapping import peel, plain_name, unwrap


def stack() -> nn.Module:
    return nn.ModuleDict({"module": nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 64))})


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


def test_a_part_that_is_called_module_keeps_its_name() -> None:
    model = stack()
    assert unwrap(model) is model
    assert plain_name("module.0.weight") == "module.0.weight"


def test_the_order_of_the_wrappers_does_not_matter() -> None:
    model = stack()
    twice = compiled(nn.DataParallel(compiled(model)))
    assert unwrap(twice) is model
    assert [type(layer).__name__ for layer in peel(twice)] == [
        *("OptimizedModule", "DataParallel", "OptimizedModule", "ModuleDict")
    ]


@pytest.mark.parametrize(
    "wrap", [compiled, checkpoint_wrapper, lambda part: compiled(checkpoint_wrapper(part))]
)
@pytest.mark.parametrize("quantized", [False, True])
def test_wrapped_parts_keep_their_names(wrap, quantized: bool) -> None:
    model, plain = stack(), stack()
    if quantized:
        quantize_nf4(model)
    model["module"][1] = wrap(model["module"][1])
    model["module"] = wrap(model["module"])
    assert [name for name, _ in named_weights(model)] == [name for name, _ in plain.named_parameters()]
