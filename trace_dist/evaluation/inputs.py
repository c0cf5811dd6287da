"""Padded inputs, and on which side a model may be padded ([Note: padding and caches] in evaluation/decode.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from trace_dist.data.encoding import pad_id
from trace_dist.models.architecture import vocabulary_size
from trace_dist.models.forward import names_argument

_ROUNDING = 0.02
"""Share of the range of logits that rounding may move them by; bf16 rounds to 0.4 %."""
_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")


def device_of(model: torch.nn.Module) -> torch.device:
    """Device of a model's parameters."""
    return next(model.parameters()).device


def config_of(model: torch.nn.Module) -> PreTrainedConfig:
    """Configuration of a transformers model, or of the one inside a wrapper that forwards attributes."""
    return cast(PreTrainedConfig, model.config)


def fill_id(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """Id that fills padded positions, one that the model has an embedding for."""
    return pad_id(tokenizer, vocabulary_size(config_of(model)))


def pad(
    rows: Sequence[Sequence[int]], fill: int, device: torch.device, *, left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values with ``fill`` on one side and their attention mask (0 on the fill); int64 [rows, longest]."""
    longest = max(len(row) for row in rows)
    values = torch.full((len(rows), longest), fill)
    mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), None) if left else slice(len(row))
        values[i, where] = torch.tensor(row, dtype=torch.int64)
        mask[i, where] = 1
    return values.to(device), mask.to(device)


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position of each token in its own row, 0 on the padding; int64, shape of the mask."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def last(tokens: torch.Tensor, num: int) -> torch.Tensor:
    """Indices of the last ``num`` columns, for ``logits_to_keep``.

    An index, not a number: that would make a strided slice, which ZeRO-3's linear function multiplies as a batch of matrices,
    with a copy of the output head for every row.
    """
    return torch.arange(tokens.shape[1] - num, tokens.shape[1], device=tokens.device)


def check_decoder(model: torch.nn.Module) -> None:
    """Raise ValueError unless a model continues the text that it reads."""
    told = [name for name in ("langs", "perm_mask") if names_argument(_inner(model), name)]
    if getattr(config_of(model), "is_encoder_decoder", False) or told:
        raise ValueError(
            f"model={type(_inner(model)).__name__}: it does not continue the text that it reads (it is an encoder-decoder, or "
            "fills in masked positions); give a causal LM"
        )


def may_pad_left(model: torch.nn.Module) -> bool:
    """Whether a model can be told to leave out padding on the left: all its layers attend, and it takes positions.

    ``_is_stateful`` is transformers' own word for recurrent models.
    """
    inner = _inner(model)
    kinds = getattr(config_of(model).get_text_config(), "layer_types", None) or ()
    return (
        not getattr(inner, "_is_stateful", False)
        and all(kind in _ATTENTION for kind in kinds)
        and cache_argument(model) is not None
        and names_argument(inner, "position_ids")
        and not _counts_behind_padding(inner)
    )


def _counts_behind_padding(model: torch.nn.Module) -> bool:
    """Whether a model's own positions begin behind the id of padding, as RoBERTa's do; those that it is given begin at 0.

    It was trained with its own, and ``generate`` gives it the others.
    """
    return any(
        isinstance(part, torch.nn.Embedding) and part.padding_idx is not None and "position" in path
        for path, part in model.named_modules()
    )


def safe_batch_size(model: torch.nn.Module, rows: Sequence[Sequence[int]], fill: int, batch_size: int) -> int:
    """``batch_size``, or 1 where rows must not be padded at all. Collective: it may make two forward passes.

    Padding on the right changes nothing in a causal model, but some let a prompt see all of itself and read no mask
    (CPM-Ant).
    """
    if batch_size == 1 or may_pad_left(model) or len({len(row) for row in rows}) == 1:
        return batch_size
    row = min(rows, key=len)
    found = []
    for num_fill in (0, 3):
        tokens = torch.tensor([[*row, *[fill] * num_fill]], device=device_of(model))
        mask = torch.tensor([[1] * len(row) + [0] * num_fill], device=tokens.device)
        options = supported(model, attention_mask=mask, use_cache=False)
        found.append(model(input_ids=tokens, **options).logits[0, len(row) - 1].float())
    alone, padded = found
    return batch_size if (alone - padded).abs().max() <= _ROUNDING * (alone.max() - alone.min()) else 1


def cache_argument(model: torch.nn.Module) -> str | None:
    """What the forward method and its output call the cache of keys and values; None where it takes none."""
    return next((name for name in ("cache", "past_key_values") if names_argument(_inner(model), name)), None)


def keeps_keys_alone(cache: Any) -> bool:
    """Whether a cache holds the keys and values of attention and nothing else; a subclass may hold more."""
    return type(cache) is DynamicCache and not any(
        isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers
    )


def _inner(model: Any) -> Any:
    """The model inside PEFT's wrapper, or the model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def supported(model: torch.nn.Module, **kwargs: Any) -> dict[str, Any]:
    """Those of the keyword arguments that the model's forward names."""
    return {name: value for name, value in kwargs.items() if names_argument(_inner(model), name)}
