"""An identity of a base model, kept in masks and deltas so that they are refused on another model.

A fingerprint has 64 hexadecimal digits, in three parts:

- 32 of the architecture, every tensor's shape, and 32 of its values. This is all that fingerprints of earlier releases have;
- 16 of all values, rounded to bfloat16, and 16 of all values in fp32 ([Note: content sums] in models/content.py).

So a model has one identity in whatever files it lies, a copy of it in bfloat16 counts as the same, and any other change of a
value makes another model. Names are not covered: tied tensors stored twice, a missing prefix or older names change nothing. All
weights are read once, a piece at a time; ranks that call together share the work.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trace_dist.models.architecture import read_config, stated
from trace_dist.models.content import CHUNK, content_sums
from trace_dist.models.roles import full_shape
from trace_dist.models.weight_files import WeightFiles, open_weights
from trace_dist.utils import dist
from trace_dist.utils.together import on_all

NUM_SAMPLES = 32
"""Values sampled per tensor, evenly spaced from its first to its last."""
SAMPLED, ROUNDED = 32, 48
"""Where the digits of samples end, and those of rounded values."""
PIECE = 16 * CHUNK
"""Values that are read at a time."""

_ESSENTIALS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rope_parameters",
)


@dataclass(frozen=True)
class _Tensor:
    """What a fingerprint covers of one tensor.

    Attributes:
        shape: of the whole.
        samples: [at most NUM_SAMPLES] fp32.
        sums: [2] int64, from ``content_sums``.
    """

    shape: tuple[int, ...]
    samples: Tensor
    sums: Tensor


def fingerprint(source: str | Path | nn.Module, together: bool = False) -> str:
    """Identity of a model: 64 hexadecimal digits.

    A folder and the model loaded from it have the same fingerprint, unless the module lays its weights out
    otherwise than the files do (experts fused while loading): then compare folders with folders.

    Args:
        source: a checkpoint folder or hub id, or a transformers model. Where the model is sharded by ZeRO-3 or FSDP2,
            all ranks must call this together.
        together: all ranks call this with the same folder, and each reads its share. Collective then.

    Raises:
        ValueError: no such checkpoint.
    """
    if isinstance(source, nn.Module):
        return _digest(source.config, _of_module(source))
    if not together:
        return _digest(*_of_files(source, 0, 1))
    config, tensors = on_all(lambda: _of_files(source, dist.rank(), dist.world_size()))
    sums = torch.stack([each.sums for each in tensors]).to(dist.local_device())
    whole = dist.sum_over_ranks(sums).cpu()
    return _digest(config, [replace(each, sums=sums) for each, sums in zip(tensors, whole, strict=True)])


def same_model(one: str, other: str) -> bool:
    """Whether two fingerprints are of one model, or of a model and its copy in bfloat16.

    One of an earlier release says nothing of values beyond the samples, so only these are compared with it.
    """
    if one[:SAMPLED] != other[:SAMPLED]:
        return False
    if one == other or SAMPLED in (len(one), len(other)):
        return True
    rounded = one[SAMPLED:ROUNDED]
    # rounding changes nothing where all values are in bfloat16
    one_is_rounded = rounded in (one[ROUNDED:], other[ROUNDED:])
    return rounded == other[SAMPLED:ROUNDED] and one_is_rounded


def fuller(one: str, other: str) -> str:
    """Of two fingerprints of one model, the one that covers more."""
    return max(one, other, key=len)


def check_same(expected: str, found: str, what: str) -> None:
    """Refuse a file that was made for another model.

    Args:
        expected: fingerprint stored in the file.
        found: fingerprint of the model at hand.
        what: the file, for the message, such as ``mask rev.safetensors``.

    Raises:
        ValueError: the two differ.
    """
    if same_model(expected, found):
        return
    others = f"for the model with fingerprint {expected[:12]}, not for this one ({found[:12]})"
    if expected[:SAMPLED] == found[:SAMPLED]:
        others = "for a model of these shapes, but some of the weights were changed since"
    raise ValueError(f"{what}: made {others}; load the model it was made for, or make it again for this one")


def _positions(shape: tuple[int, ...]) -> list[int]:
    numel = math.prod(shape)
    count = min(NUM_SAMPLES, numel)
    return [i * (numel - 1) // max(count - 1, 1) for i in range(count)]


def _of_files(source: str | Path, rank: int, ranks: int) -> tuple[Any, list[_Tensor]]:
    """The config of a checkpoint and its floating-point tensors; the sums are of this rank's share of the pieces."""
    with open_weights(source) as files:
        names = [name for name in files.names() if files.is_floating_point(name)]
        if not names:
            raise ValueError(f"model.path={str(source)!r}: holds no weights; fetch the checkpoint again")
        shapes = [files.shape(name) for name in names]
        sums = torch.zeros(len(names), 2, dtype=torch.int64)
        for index, start in islice(_pieces(shapes), rank, None, ranks):
            stop = min(start + PIECE, math.prod(shapes[index]))
            sums[index] += content_sums(files.read(names[index], start, stop), start)
        samples = [_samples(files, name, shape) for name, shape in zip(names, shapes, strict=True)]
        config = read_config(files.folder, f"model.path={str(source)!r}")
    return config, list(map(_Tensor, shapes, samples, sums))


def _pieces(shapes: list[tuple[int, ...]]) -> Iterator[tuple[int, int]]:
    """(tensor, first element) of every piece."""
    for index, shape in enumerate(shapes):
        yield from ((index, start) for start in range(0, math.prod(shape), PIECE))


def _samples(files: WeightFiles, name: str, shape: tuple[int, ...]) -> Tensor:
    values = [files.read(name, i, i + 1) for i in _positions(shape)]
    return torch.cat(values) if values else torch.empty(0)


def _of_module(model: nn.Module) -> list[_Tensor]:
    """Everything floating that a checkpoint of the model would hold. Collective where the model is sharded."""
    tensors = [tensor for tensor in model.state_dict(keep_vars=True).values() if tensor.is_floating_point()]
    shapes = [full_shape(tensor) for tensor in tensors]
    samples, sums = [], []
    for tensor, shape in zip(tensors, shapes, strict=True):
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        samples.append(_local_values(whole, _positions(shape)))
        sums.append(_local_sums(whole, math.prod(shape)))
    is_shard = [hasattr(tensor, "ds_tensor") for tensor in tensors]
    if any(is_shard):  # each sample lies on one rank and is zero on the others
        samples, sums = _summed(samples, is_shard), _summed(sums, is_shard)
    return list(map(_Tensor, shapes, samples, sums))


def _summed(parts: list[Tensor], is_shard: list[bool]) -> list[Tensor]:
    """The parts, those of shards summed over the ranks. Collective."""
    shards = [part for part, shard in zip(parts, is_shard, strict=True) if shard]
    summed = dist.sum_over_ranks(torch.cat(shards).to(dist.local_device())).cpu()
    whole = iter(summed.split([len(part) for part in shards]))
    return [next(whole) if shard else part for part, shard in zip(parts, is_shard, strict=True)]


def _local_sums(tensor: Any, numel: int) -> Tensor:
    """Content sums of what lies here of a tensor; a shard's padding is no part of it."""
    shard = getattr(tensor, "ds_tensor", None)
    if shard is None:
        return content_sums(tensor.detach().reshape(-1))
    start = tensor.ds_zero_partition_rank * shard.numel()
    return content_sums(shard.detach().reshape(-1)[: max(numel - start, 0)], start)


def _local_values(tensor: Any, positions: list[int]) -> Tensor:
    """Values at flat positions, fp32 on the CPU; zero where another rank's shard holds them."""
    index = torch.tensor(positions, dtype=torch.int64)
    shard = getattr(tensor, "ds_tensor", None)
    if shard is None:
        return tensor.detach().reshape(-1)[index.to(tensor.device)].float().cpu()
    index -= tensor.ds_zero_partition_rank * shard.numel()
    here = (index >= 0) & (index < shard.numel())
    values = torch.zeros(len(index))
    values[here] = shard.detach()[index[here].to(shard.device)].float().cpu()
    return values


def _digest(config: Any, tensors: Sequence[_Tensor]) -> str:
    text = config.get_text_config()
    essentials = {name: stated(text, name) for name in _ESSENTIALS}
    # + 0.0 turns -0.0, which sums over ranks lose, into 0.0.
    lines = {f"{list(each.shape)} {(each.samples.to(torch.bfloat16) + 0.0).tolist()}" for each in tensors}
    sampled = _sha256(json.dumps(essentials, sort_keys=True, default=str), lines)[:SAMPLED]
    rounded, exact = (
        _sha256("", {f"{list(each.shape)} {int(each.sums[which])}" for each in tensors})[: ROUNDED - SAMPLED]
        for which in (0, 1)
    )
    return sampled + rounded + exact


def _sha256(begin: str, lines: set[str]) -> str:
    return hashlib.sha256((begin + "\n".join(sorted(lines))).encode()).hexdigest()
