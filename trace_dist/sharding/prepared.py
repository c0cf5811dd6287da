"""The engine on a model that something else has prepared: plain, DDP, sharded by ``fully_shard`` or by a DeepSpeed engine.

The model stays what it is and keeps the caller's loop: ``loss.backward()`` on it fills compact gradients. Under DDP its own
dense all-reduce is switched off; ours carries masked entries only.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from trace_dist.models.wrapping import is_deepspeed_engine, peel
from trace_dist.sharding.base import ShardedModel
from trace_dist.sharding.single import ReplicatedModel
from trace_dist.utils import dist


def as_sharded(model: ShardedModel | nn.Module) -> ShardedModel:
    """The engine's view of a model, which it freezes.

    Args:
        model: a sharded model (returned as it is), or one that is plain, wrapped by DDP, sharded by ``fully_shard`` (by
            hand or by accelerate) or by a DeepSpeed ZeRO-3 engine that has no optimizer; compiled by ``torch.compile`` or not.

    Raises:
        ValueError: DeepSpeed or FSDP1 already owns the gradients, or the model is sharded in a way with no single owner
            per entry.
    """
    if isinstance(model, ShardedModel):
        return model
    dist.init_distributed()
    layers = peel(model)
    around = [layer for layer in layers if isinstance(layer, DistributedDataParallel)]
    for ddp in around:
        ddp.require_backward_grad_sync = False  # what `no_sync` sets: its reducer then stays idle
    if any(isinstance(layer, nn.DataParallel) for layer in layers):
        raise ValueError(
            "model: wrapped by nn.DataParallel, whose copies of a layer get no gradients of their own; start one process for "
            "each GPU (torchrun, deepspeed or accelerate launch)"
        )
    for layer in layers:
        if is_deepspeed_engine(layer):
            from trace_dist.sharding.zero3 import Zero3Model

            return Zero3Model.adopt(layer)
    inside = layers[-1]
    if isinstance(inside, FullyShardedDataParallel):
        raise ValueError(
            "model: wrapped by FSDP1, which owns the gradients of flattened groups; use fully_shard (FSDP2; in accelerate "
            "fsdp_version: 2) or trace_dist.shard(model, backend='fsdp2')"
        )
    if any(hasattr(parameter, "ds_id") for parameter in inside.parameters()):
        raise ValueError(
            "model: built under deepspeed.zero.Init but not initialised; pass trace_dist.shard(model, backend='zero3')"
        )
    if isinstance(inside, FSDPModule):
        from trace_dist.sharding.fsdp2 import Fsdp2Model

        return Fsdp2Model(model)
    inner = [name for name, child in inside.named_modules() if isinstance(child, FSDPModule)]
    if inner:
        raise ValueError(
            f"model: {inner[0]!r} is sharded by fully_shard but the whole is not; call fully_shard(model) last"
        )
    if not around:  # DDP has made them the same
        _check_same_weights(inside)
    return ReplicatedModel(model)


def _check_same_weights(model: nn.Module) -> None:
    """Raise ValueError where the ranks hold different weights, of which only the masked ones would become equal. Collective.

    Some values of each parameter are compared.
    """
    if dist.world_size() == 1:
        return
    samples = {
        name: p.detach().flatten()[:: max(1, p.numel() // 8)].tolist() for name, p in model.named_parameters()
    }
    everyone = dist.gather_objects(samples)
    for name, values in everyone[0].items():
        if any(other.get(name) != values for other in everyone):
            raise ValueError(
                f"model: {name!r} differs between the ranks; load one checkpoint, or set the same seed, on every rank"
            )
