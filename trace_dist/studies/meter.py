"""What a study's models compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class Meter:
    """Floating-point operations of a model's passes: 2 per weight and token forward, 4 more where a backward pass follows.

    Weights of embeddings do no arithmetic; padding counts, since it is computed. What a mask saves of the weight gradients is
    not taken off, nor are the products of attention.
    """

    flops: float = 0.0
    reused_s: float = 0.0
    """Wall time of probes whose result was used again; their operations count each time."""

    def watch(self, module: nn.Module) -> None:
        """Count a model's passes from now on."""
        inputs = getattr(module, "get_input_embeddings", lambda: None)()
        held = {id(parameter) for parameter in inputs.parameters()} if inputs is not None else set()
        weights = sum(each.numel() for each in module.parameters() if id(each) not in held)

        def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens = (kwargs["input_ids"] if "input_ids" in kwargs else args[0]).numel()
            self.flops += (6 if torch.is_grad_enabled() else 2) * weights * tokens

        module.register_forward_pre_hook(count, with_kwargs=True)
