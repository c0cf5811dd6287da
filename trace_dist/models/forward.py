"""What a model's forward pass takes."""

from __future__ import annotations

import inspect

from torch import nn


def names_argument(model: nn.Module, name: str) -> bool:
    """Whether the forward method names an argument, such as ``logits_to_keep`` (nearly all of transformers' do).

    Its own, or, where it takes any keyword, that of the base model behind the output head.
    """
    parameters = inspect.signature(model.forward).parameters
    base = getattr(model, "base_model", model)
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return name in parameters or (
        passes_on and base is not model and name in inspect.signature(base.forward).parameters
    )
