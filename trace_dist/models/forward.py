"""What a model's forward pass takes."""

from __future__ import annotations

import inspect

from torch import nn


def names_argument(model: nn.Module, name: str) -> bool:
    """Whether the forward method names an argument, such as ``logits_to_keep`` (nearly all of transformers' do)."""
    return name in inspect.signature(model.forward).parameters
