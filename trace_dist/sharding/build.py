"""Choosing a backend."""

from __future__ import annotations

import torch
from torch import nn

from trace_dist.config import Quantize
from trace_dist.models.quantised import refuse_quantised_module
from trace_dist.sharding.base import ShardedModel
from trace_dist.sharding.saving import check_can_be_saved
from trace_dist.sharding.single import SingleModel
from trace_dist.utils import dist

BACKENDS = ("single", "zero3", "fsdp2")


def _backend(name: str) -> type[ShardedModel]:
    """The class of a backend; DeepSpeed and FSDP2 are imported only when asked for.

    Raises:
        ValueError: unknown backend.
    """
    if name == "single":
        return SingleModel
    if name == "zero3":
        from trace_dist.sharding.zero3 import Zero3Model

        return Zero3Model
    if name == "fsdp2":
        from trace_dist.sharding.fsdp2 import Fsdp2Model

        return Fsdp2Model
    raise ValueError(f"backend={name!r}: unknown; use one of {', '.join(BACKENDS)}")


def shard(model: nn.Module, backend: str = "single") -> ShardedModel:
    """Spread a transformers model over the ranks of this job and freeze it. Collective.

    Args:
        model: the model; ``zero3`` and ``fsdp2`` shard it in place.
        backend: ``single``, ``zero3`` (DeepSpeed ZeRO-3, arXiv 1910.02054) or ``fsdp2`` (torch's ``fully_shard``).

    Returns:
        The model to call and to give to ``MaskedAdamW``, with ``backward``, ``save_pretrained`` and more. Its weights keep their
        dtype and receive no gradient before a mask is attached.

    Raises:
        ValueError: unknown backend, ``single`` with more than one rank, or a model with quantised weights or PEFT adapters.
    """
    kind = _backend(backend)
    refuse_quantised_module(model)
    check_can_be_saved(model)
    dist.init_distributed()
    return kind(model)


def load_sharded(path: str, dtype: str, backend: str = "single", quantize: Quantize = "none") -> ShardedModel:
    """Load a checkpoint straight into its shards. Collective.

    Args:
        path: Hugging Face id or folder with safetensors.
        dtype: ``float32`` or ``bfloat16``.
        backend: ``single``, ``zero3`` or ``fsdp2``; under the last two no rank ever holds the whole model.
        quantize: ``nf4`` keeps the linear layers as frozen 4-bit codes (arXiv 2305.14314); masked entries live beside them.

    Returns:
        As ``shard``.

    Raises:
        ValueError: unknown backend; a checkpoint that cannot be loaded; ``nf4`` without bitsandbytes.
    """
    kind = _backend(backend)
    dist.init_distributed()
    return kind.from_pretrained(path, getattr(torch, dtype), quantize)
