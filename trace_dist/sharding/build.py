"""Choosing a backend."""

from __future__ import annotations

import torch
from torch import nn

from trace_dist.models.loading import load_model
from trace_dist.sharding.base import ShardedModel
from trace_dist.sharding.single import SingleModel
from trace_dist.utils import dist

BACKENDS = ("single", "zero3")


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: unknown; use one of {', '.join(BACKENDS)}")


def shard(model: nn.Module, backend: str = "single") -> ShardedModel:
    """Spread a transformers causal LM over the ranks of this job and freeze it.

    Args:
        model: the model; ``zero3`` partitions it in place.
        backend: ``single`` or ``zero3``.

    Raises:
        ValueError: unknown backend, or ``single`` with more than one rank.
    """
    _check_backend(backend)
    dist.init_distributed()
    if backend == "single":
        return SingleModel(model)
    from trace_dist.sharding.zero3 import Zero3Model

    return Zero3Model(model)


def load_sharded(path: str, dtype: str, backend: str = "single") -> ShardedModel:
    """Load a checkpoint straight into its shards.

    Args:
        path: Hugging Face id or folder with safetensors.
        dtype: ``float32`` or ``bfloat16``.
        backend: ``single`` or ``zero3``; under zero3 no rank ever holds the whole model.
    """
    _check_backend(backend)
    dist.init_distributed()
    torch_dtype = getattr(torch, dtype)
    if backend == "single":
        return SingleModel(load_model(path, torch_dtype))
    from trace_dist.sharding.zero3 import Zero3Model

    return Zero3Model.from_pretrained(path, torch_dtype)
