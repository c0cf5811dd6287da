"""Filling a sharded module from safetensors files: every rank reads exactly its own intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from trace_dist.models.naming import RESAVE, Pieces
from trace_dist.models.nf4 import BLOCK_SIZE, NF4Linear, quantize_weight, words_per_block
from trace_dist.models.weight_files import WeightFiles


class Slot(NamedTuple):
    """Where one rank's part of a parameter goes.

    ``flat``: 1-D storage, filled in place; what exceeds the parameter's end becomes zero. ``start``: flat index in the
    whole parameter of its first element. ``numel``: elements of the whole parameter.
    """

    flat: torch.Tensor
    start: int
    numel: int


@torch.no_grad()
def fill(model: PreTrainedModel, files: WeightFiles, pieces: Pieces, slot: Callable[[Any], Slot]) -> None:
    """Fill parameters and buffers.

    Args:
        model: the sharded module.
        files: what they are read from.
        pieces: which tensors of the files, laid end to end, make each parameter.
        slot: this rank's part of a parameter.

    Raises:
        ValueError: the files lack a parameter, or hold another size or differing twins of tied ones.
    """
    _fill_parameters(model, files, pieces, slot)
    _fill_buffers(model, files, pieces)


def _fill_parameters(
    model: PreTrainedModel, files: WeightFiles, pieces: Pieces, slot: Callable[[Any], Slot]
) -> None:
    coded = {  # words of 4-bit layers: [Note: words] in models/nf4.py
        f"{path}.{leaf}": (f"{path}.weight", layer)
        for path, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, NF4Linear)
        for leaf in ("packed", "absmax")
    }
    names_of: dict[Any, list[str]] = {}  # several names where parameters are tied
    for name, param in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(param, []).append(name)
    logical = {param: [coded.get(name, (name,))[0] for name in names] for param, names in names_of.items()}
    stored = {param: [name for name in names if name in pieces] for param, names in logical.items()}
    missing = [logical[param][0] for param, found in stored.items() if not found]
    if missing:
        raise ValueError(missing_parameters(files.folder, missing))
    for param, names in stored.items():
        own, inside = slot(param), names_of[param][0]
        if inside in coded:
            layer = coded[inside][1]
            _fill_words(own, layer, inside.rpartition(".")[2], _Source(files, pieces[names[0]]))
            param._is_hf_initialized = True
            continue
        _fill_slot(own, _Source(files, pieces[names[0]]))
        for name in names[1:]:
            twin = own._replace(flat=torch.empty_like(own.flat))
            _fill_slot(twin, _Source(files, pieces[name]))
            if not torch.equal(twin.flat, own.flat):
                raise ValueError(
                    f"model.path={str(files.folder)!r}: {names[0]} and {name} are tied but stored with "
                    "different values; set tie_word_embeddings to false in its config.json"
                )
        param._is_hf_initialized = True


class _Source:
    """The values of one parameter: tensors of the files, flattened and laid end to end."""

    def __init__(self, files: WeightFiles, names: list[str]) -> None:
        self.files, self.names = files, names
        self.sizes = [math.prod(files.shape(name)) for name in names]

    def check(self, numel: int) -> None:
        """Raise ValueError unless there are ``numel`` values."""
        if sum(self.sizes) != numel:
            raise ValueError(
                f"model.path={str(self.files.folder)!r}: {self.names[0]} has {sum(self.sizes)} elements but "
                f"config.json asks for {numel}; give the checkpoint its own config"
            )

    def copy(self, start: int, out: torch.Tensor) -> None:
        """Fill ``out`` [n] with the values from ``start`` on; what exceeds the end becomes zero."""
        filled = offset = 0
        for name, size in zip(self.names, self.sizes, strict=True):
            low = min(max(start - offset, 0), size)
            high = min(max(start + out.numel() - offset, 0), size)
            out[filled : filled + high - low].copy_(self.files.read(name, low, high))
            filled += high - low
            offset += size
        out[filled:].zero_()


def _fill_slot(slot: Slot, source: _Source) -> None:
    """Fill one rank's part of a parameter."""
    source.check(slot.numel)
    source.copy(slot.start, slot.flat)


def _fill_words(slot: Slot, layer: NF4Linear, leaf: str, source: _Source) -> None:
    """Fill one rank's part of a layer's codes or scales; only the blocks that touch it are read and quantised."""
    source.check(math.prod(layer.shape))
    per_block = words_per_block(leaf, layer.dtype)
    first = slot.start // per_block
    stop = min(-(-(slot.start + slot.flat.numel()) // per_block), slot.numel // per_block)
    slot.flat.zero_()
    if stop <= first:
        return
    values = torch.empty((stop - first) * BLOCK_SIZE, dtype=layer.dtype, device=slot.flat.device)
    source.copy(first * BLOCK_SIZE, values)
    words = dict(zip(("packed", "absmax"), quantize_weight(values), strict=True))[leaf]
    words = words[slot.start - first * per_block :][: slot.flat.numel()]
    slot.flat[: words.numel()].copy_(words)


def _fill_buffers(model: PreTrainedModel, files: WeightFiles, pieces: Pieces) -> None:
    """Copy the buffers that the checkpoint holds, and compute the others as an ordinary load does."""
    for name, buffer in model.named_buffers():
        if name in pieces:
            (source,) = pieces[name]
            buffer.copy_(files.tensor(source))
            buffer._is_hf_initialized = True  # type: ignore[attr-defined]
    model.initialize_weights()  # skips what is marked as initialised, which every parameter is by now


def missing_parameters(folder: Path, names: list[str]) -> str:
    """The error for a checkpoint that lacks parameters."""
    few = ", ".join(names[:3])
    return f"model.path={str(folder)!r}: lacks {len(names)} parameters of its model, such as {few}; {RESAVE}"
