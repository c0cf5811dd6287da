"""Choosing a backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trace_dist.config import Quantize
from trace_dist.config.checks import check_ranks
from trace_dist.models.architecture import read_config
from trace_dist.models.kinds import check_quantize, torch_dtype
from trace_dist.models.places import lay_out, refuse_empty, refuse_scattered
from trace_dist.models.quantised import refuse_quantised_module
from trace_dist.models.wrapping import peel, unwrap
from trace_dist.sharding.base import ShardedModel, view_of
from trace_dist.sharding.holding import HoldingModel
from trace_dist.sharding.prepared import refuse_tensor_parallel
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


def shard(model: nn.Module, backend: str = "single", sequence_parallel: int = 1) -> ShardedModel:
    """Spread a transformers model over the ranks of this job and freeze it. Collective.

    Args:
        model: the model; ``zero3`` and ``fsdp2`` shard it in place.
        backend: ``single``, ``zero3`` (DeepSpeed ZeRO-3, arXiv 1910.02054) or ``fsdp2`` (torch's ``fully_shard``).
        sequence_parallel: ranks that share rows, one after another: all of them have the same batch, and each calls the model on
            ``sharded.sequence.slice(batch)``. Labels there are one longer than the tokens: ``labels[:, 1:]`` are what follows.

    Returns:
        The model to call and to give to ``MaskedAdamW``, with ``backward``, ``save_pretrained`` and more. Its weights keep their
        dtype and receive no gradient before a mask is attached.

    Raises:
        ValueError: unknown backend, ``single`` with more than one rank, a model with quantised weights or PEFT adapters, with
            weights on several devices, without values or cut out of another's memory, one whose attention heads so many ranks
            cannot share, or whose rows another number of ranks shares already.
    """
    _check_size(sequence_parallel)
    kind, layers = _backend(backend), peel(model)
    refuse_quantised_module(model)
    refuse_tensor_parallel(model)
    refuse_scattered(model)
    if dist.local_device().type != "meta":  # as that of a simulated rank
        refuse_empty(model)
    check_can_be_saved(model)
    lay_out(model)
    dist.init_distributed()
    if sequence_parallel > 1:
        _check_shared(unwrap(model).config, sequence_parallel)
    known = view_of(layers)  # sharded in place it cannot be sharded again
    sharded = known if isinstance(known, HoldingModel) and type(known) is kind else kind(model)
    sharded.share_rows(sequence_parallel)
    return sharded


def load_sharded(
    path: str,
    dtype: str | torch.dtype,
    backend: str = "single",
    quantize: Quantize = "none",
    sequence_parallel: int = 1,
) -> ShardedModel:
    """Load a checkpoint straight into its shards. Collective.

    Args:
        path: Hugging Face id or folder with safetensors.
        dtype: ``float32`` or ``bfloat16``, by name or as torch's.
        backend: ``single``, ``zero3`` or ``fsdp2``; under the last two no rank ever holds the whole model.
        quantize: ``nf4`` keeps the linear layers as frozen 4-bit codes (arXiv 2305.14314); masked entries live beside them.
        sequence_parallel: as ``shard``.

    Returns:
        As ``shard``.

    Raises:
        ValueError: unknown backend, ``dtype`` or ``quantize``; a checkpoint that cannot be loaded; ``nf4`` without bitsandbytes;
            attention heads that so many ranks cannot share.
    """
    _check_size(sequence_parallel)
    kind, dtype = _backend(backend), torch_dtype(dtype)
    check_quantize(quantize)
    dist.init_distributed()
    if sequence_parallel > 1:
        _check_shared(read_config(path, f"path={path!r}"), sequence_parallel)
    sharded = kind.from_pretrained(path, dtype, quantize)
    sharded.share_rows(sequence_parallel)
    return sharded


def _check_size(sequence_parallel: int) -> None:
    if sequence_parallel < 1:
        raise ValueError(f"sequence_parallel={sequence_parallel}: must be at least 1; use 1 for none")


def _check_shared(config: Any, sequence_parallel: int) -> None:
    """Before anything is sharded, which takes long."""
    # It brings models and data, which whoever opens a bank does without.
    from trace_dist.sharding.sequence import check_divisible

    check_ranks(dist.world_size(), sequence_parallel)
    check_divisible(config, sequence_parallel)
