"""The decoder blocks of a model, which sharding libraries gather and free as one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

WHOLE_BLOCK_ELEMENTS = 2**28
"""Larger blocks are gathered module by module under ZeRO-3: 0.5 GiB in bf16; those of an 8B model have 0.22e9 elements."""


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> block, by the classes that transformers says must not be split over devices; empty where it names none.

    Some name a block's parts too (Mamba its mixer): the outermost counts. ``fully_shard`` puts "FSDP" before a class's name.
    """
    classes = set(getattr(model, "_no_split_modules", None) or ())
    blocks: dict[str, nn.Module] = {}
    for path, child in model.named_modules():
        parents = (path[:end] for end, letter in enumerate(path) if letter == ".")
        if type(child).__name__.removeprefix("FSDP") in classes and not any(
            parent in blocks for parent in parents
        ):
            blocks[path] = child
    return blocks


def whole_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder blocks if all are small enough to be gathered whole under ZeRO-3, else none."""
    blocks = decoder_blocks(model)
    return blocks if largest(blocks.values()) <= WHOLE_BLOCK_ELEMENTS else {}


def largest(blocks: Iterable[nn.Module]) -> int:
    """Elements of the largest of some blocks; 0 where there are none."""
    return max((sum(map(_numel, block.parameters())) for block in blocks), default=0)


def _numel(parameter: Any) -> int:
    """Elements of a parameter, partitioned by ZeRO-3 or not."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
