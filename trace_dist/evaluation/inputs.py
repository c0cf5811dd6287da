"""Left-padded inputs: every row ends in the last column, so what is predicted lines up on the right."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedConfig


def device_of(model: torch.nn.Module) -> torch.device:
    """Device of a model's parameters."""
    return next(model.parameters()).device


def config_of(model: torch.nn.Module) -> PreTrainedConfig:
    """Configuration of a transformers model, or of the one inside a wrapper that forwards attributes."""
    return cast(PreTrainedConfig, model.config)


def left_pad(
    rows: Sequence[Sequence[int]], fill: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values with ``fill`` on the left and their attention mask (0 on the fill); int64 [rows, longest]."""
    longest = max(len(row) for row in rows)
    values = [[fill] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(values, device=device), torch.tensor(mask, device=device)


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position of each token in its own row, 0 on the padding; int64, shape of the mask."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def last(tokens: torch.Tensor, num: int) -> torch.Tensor:
    """Indices of the last ``num`` columns, for ``logits_to_keep``.

    An index, not a number: that would make a strided slice, which ZeRO-3's linear function multiplies as a batch of matrices,
    with a copy of the output head for every row.
    """
    return torch.arange(tokens.shape[1] - num, tokens.shape[1], device=tokens.device)


def supported(model: torch.nn.Module, **kwargs: Any) -> dict[str, Any]:
    """Those of the keyword arguments that the model's forward names, or may pass on (PEFT's wrappers).

    ``logits_to_keep`` only saves memory, so it is given only where it is named.
    """
    accepted = inspect.signature(model.forward).parameters
    passes_on = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in accepted.values())
    return {
        name: value
        for name, value in kwargs.items()
        if name in accepted or (passes_on and name != "logits_to_keep")
    }
