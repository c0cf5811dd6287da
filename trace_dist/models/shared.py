"""Parameters that a model has under several names."""

from __future__ import annotations

from torch import nn


def shared_names(module: nn.Module) -> list[list[str]]:
    """The names of each parameter that has more than one, in the model's order."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [held for held in names.values() if len(held) > 1]
