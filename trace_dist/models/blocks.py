"""The decoder blocks of a model, which sharding libraries gather and free as one."""

from __future__ import annotations

from torch import nn


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> block, by the classes that transformers says must not be split over devices; empty where it names none."""
    classes = set(getattr(model, "_no_split_modules", None) or ())
    return {path: child for path, child in model.named_modules() if type(child).__name__ in classes}
