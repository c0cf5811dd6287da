"""Filling a sharded module from safetensors files: every rank reads exactly its own intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from trace_dist.models.checkpoint import Checkpoint
from trace_dist.models.naming import RESAVE, Pieces


class Slot(NamedTuple):
    """Where one rank's part of a parameter goes.

    ``flat``: 1-D storage, filled in place; what exceeds the parameter's end becomes zero. ``start``: flat index in the
    whole parameter of its first element. ``numel``: elements of the whole parameter.
    """

    flat: torch.Tensor
    start: int
    numel: int


@torch.no_grad()
def fill(model: PreTrainedModel, checkpoint: Checkpoint, pieces: Pieces, slot: Callable[[Any], Slot]) -> None:
    """Fill parameters and buffers.

    Args:
        model: the sharded module.
        checkpoint: the files.
        pieces: which tensors of the files, laid end to end, make each parameter.
        slot: this rank's part of a parameter.

    Raises:
        ValueError: the files lack a parameter, or hold another size or differing twins of tied ones.
    """
    _fill_parameters(model, checkpoint, pieces, slot)
    _fill_buffers(model, checkpoint, pieces)


def _fill_parameters(
    model: PreTrainedModel, checkpoint: Checkpoint, pieces: Pieces, slot: Callable[[Any], Slot]
) -> None:
    names_of: dict[Any, list[str]] = {}  # several names where parameters are tied
    for name, param in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(param, []).append(name)
    stored = {param: [name for name in names if name in pieces] for param, names in names_of.items()}
    missing = [names_of[param][0] for param, found in stored.items() if not found]
    if missing:
        raise ValueError(missing_parameters(checkpoint.folder, missing))
    for param, names in stored.items():
        own = slot(param)
        _fill_slot(own, checkpoint, pieces[names[0]])
        for name in names[1:]:
            twin = own._replace(flat=torch.empty_like(own.flat))
            _fill_slot(twin, checkpoint, pieces[name])
            if not torch.equal(twin.flat, own.flat):
                raise ValueError(
                    f"model.path={str(checkpoint.folder)!r}: {names[0]} and {name} are tied but stored with "
                    "different values; set tie_word_embeddings to false in its config.json"
                )
        param._is_hf_initialized = True


def _fill_slot(slot: Slot, checkpoint: Checkpoint, sources: list[str]) -> None:
    """Fill one slot of a parameter whose values are the sources, laid end to end."""
    sizes = [math.prod(checkpoint.shape(source)) for source in sources]
    if sum(sizes) != slot.numel:
        raise ValueError(
            f"model.path={str(checkpoint.folder)!r}: {sources[0]} has {sum(sizes)} elements but config.json "
            f"asks for {slot.numel}; give the checkpoint its own config"
        )
    filled = offset = 0
    for source, size in zip(sources, sizes, strict=True):
        low = min(max(slot.start - offset, 0), size)
        high = min(max(slot.start + slot.flat.numel() - offset, 0), size)
        slot.flat[filled : filled + high - low].copy_(checkpoint.read(source, low, high))
        filled += high - low
        offset += size
    slot.flat[filled:].zero_()


def _fill_buffers(model: PreTrainedModel, checkpoint: Checkpoint, pieces: Pieces) -> None:
    """Copy the buffers that the checkpoint holds, and compute the others as an ordinary load does."""
    for name, buffer in model.named_buffers():
        if name in pieces:
            (source,) = pieces[name]
            buffer.copy_(checkpoint.tensor(source))
            buffer._is_hf_initialized = True  # type: ignore[attr-defined]
    model.initialize_weights()  # skips what is marked as initialised, which every parameter is by now


def missing_parameters(folder: Path, names: list[str]) -> str:
    """The error for a checkpoint that lacks parameters."""
    few = ", ".join(names[:3])
    return f"model.path={str(folder)!r}: lacks {len(names)} parameters of its model, such as {few}; {RESAVE}"
