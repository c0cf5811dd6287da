"""How large LoRA's adapters are, for comparisons at an equal number of trained parameters."""

from __future__ import annotations

from torch import nn

from trace_dist.models.roles import describe, maskable


def lora_rank(module: nn.Module, num_trained: float) -> int:
    """The rank at which LoRA on every linear layer trains about ``num_trained`` parameters; at least 1.

    An adapter of rank r on a layer [rows, cols] trains r * (rows + cols) parameters. PEFT adapts no experts that are fused in one
    tensor, so they are not counted.

    Raises:
        ValueError: the model has no linear layer.
    """
    infos = describe(module)
    shapes = [infos[name].shape for name in maskable(module, "linear")]
    return max(1, round(num_trained / sum(sum(shape) for shape in shapes if len(shape) == 2)))
