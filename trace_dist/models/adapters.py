"""How large LoRA's adapters are, for comparisons at an equal number of trained parameters."""

from __future__ import annotations

from collections import Counter

from torch import nn
from transformers.pytorch_utils import Conv1D

from trace_dist.models.roles import describe, maskable


def lora_rank(module: nn.Module, num_trained: float) -> int:
    """The rank at which LoRA on every linear layer trains about ``num_trained`` parameters; at least 1.

    An adapter of rank r on a layer [rows, cols] trains r * (rows + cols) parameters. Layers that share a weight have one
    each. PEFT adapts no experts that are fused in one tensor, so they are not counted.

    Raises:
        ValueError: the model has no linear layer.
    """
    infos, parameters = describe(module), dict(module.named_parameters())
    layers = Counter(each.weight for each in module.modules() if isinstance(each, nn.Linear | Conv1D))
    per_rank = sum(
        layers[parameters[name]] * sum(infos[name].shape)
        for name in maskable(module, "linear")
        if len(infos[name].shape) == 2
    )
    return max(1, round(num_trained / per_rank))
