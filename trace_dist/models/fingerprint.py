"""A cheap identity of a base model, kept in masks and deltas so that they are refused on another model.

The fingerprint covers the architecture, every tensor's shape and a sample of its values, rounded to bfloat16
so that a model has one identity whether it is loaded in fp32 or in bf16. It does not cover names: tied
tensors stored twice, a missing prefix or older names change nothing. Only headers and samples are read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trace_dist.models.architecture import read_config
from trace_dist.models.roles import full_shape
from trace_dist.models.weight_files import open_weights
from trace_dist.utils import dist

NUM_SAMPLES = 32
"""Values sampled per tensor, evenly spaced from its first to its last."""

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


def fingerprint(source: str | Path | nn.Module) -> str:
    """Identity of a model: 32 hexadecimal digits.

    A folder and the model loaded from it have the same fingerprint, unless the module lays its weights out
    otherwise than the files do (experts fused while loading): then compare folders with folders.

    Args:
        source: a checkpoint folder or hub id, or a transformers model. Where the model is sharded by ZeRO-3,
            all ranks must call this together; it sums one small tensor over them.

    Raises:
        ValueError: no such checkpoint.
    """
    if isinstance(source, nn.Module):
        return _digest(source.config, _module_samples(source))
    with open_weights(source) as files:
        samples = []
        for name in files.names():
            if files.is_floating_point(name):
                shape = files.shape(name)
                values = [files.read(name, i, i + 1) for i in _positions(shape)]
                samples.append((shape, torch.cat(values) if values else torch.empty(0)))
        return _digest(read_config(files.folder, f"model.path={str(source)!r}"), samples)


def check_same(expected: str, found: str, what: str) -> None:
    """Refuse a file that was made for another model.

    Args:
        expected: fingerprint stored in the file.
        found: fingerprint of the model at hand.
        what: the file, for the message, such as ``mask rev.safetensors``.

    Raises:
        ValueError: the two differ.
    """
    if expected != found:
        raise ValueError(
            f"{what}: made for the model with fingerprint {expected[:12]}, not for this one ({found[:12]}); "
            "load the model it was made for, or make it again for this one"
        )


def _positions(shape: tuple[int, ...]) -> list[int]:
    numel = math.prod(shape)
    count = min(NUM_SAMPLES, numel)
    return [i * (numel - 1) // max(count - 1, 1) for i in range(count)]


def _module_samples(model: nn.Module) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    """Shape and sampled values of everything a checkpoint of the model would hold."""
    tensors = [tensor for tensor in model.state_dict(keep_vars=True).values() if tensor.is_floating_point()]
    shapes = [full_shape(tensor) for tensor in tensors]
    sampled = [
        _local_values(tensor, _positions(shape)) for tensor, shape in zip(tensors, shapes, strict=True)
    ]
    is_shard = [hasattr(tensor, "ds_tensor") for tensor in tensors]
    if any(is_shard):  # each sample lies on one rank and is zero on the others
        shards = [values for values, shard in zip(sampled, is_shard, strict=True) if shard]
        summed = dist.sum_over_ranks(torch.cat(shards).to(dist.local_device())).cpu()
        whole = iter(summed.split([len(values) for values in shards]))
        sampled = [next(whole) if shard else values for values, shard in zip(sampled, is_shard, strict=True)]
    return list(zip(shapes, sampled, strict=True))


def _local_values(tensor: Any, positions: list[int]) -> torch.Tensor:
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


def _digest(config: Any, samples: Iterable[tuple[tuple[int, ...], torch.Tensor]]) -> str:
    text = config.get_text_config()
    essentials = {name: getattr(text, name, None) for name in _ESSENTIALS}
    # + 0.0 turns -0.0, which sums over ranks lose, into 0.0.
    lines = {f"{list(shape)} {(values.to(torch.bfloat16) + 0.0).tolist()}" for shape, values in samples}
    content = json.dumps(essentials, sort_keys=True, default=str) + "\n".join(sorted(lines))
    return hashlib.sha256(content.encode()).hexdigest()[:32]
