"""The engine on a model that something else has prepared: plain, DDP, sharded by ``fully_shard`` or by a DeepSpeed engine.

The model stays what it is and keeps the caller's loop: ``loss.backward()`` on it fills compact gradients. Under DDP its own
dense all-reduce is switched off; ours carries masked entries only.

[Note: DDP comes later] Trainer and accelerate wrap a model in DDP after the optimizer was built. DDP refuses a model without a
parameter that requires a gradient, as a mask of linear layers leaves it; so the smallest masked weight claims to require one.
Its layer runs through ``masked_linear``, where none arises for it. DDP keeps buckets for that weight alone, and each forward pass
through DDP tells it that this step is not its to reduce.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from trace_dist.masks.mask import Mask
from trace_dist.models.places import lay_out, refuse_empty, refuse_scattered
from trace_dist.models.quantised import refuse_quantised_module
from trace_dist.models.wrapping import is_deepspeed_engine, peel, refuse_data_parallel, unwrap
from trace_dist.sharding.base import ShardedModel, view_of
from trace_dist.sharding.single import ReplicatedModel
from trace_dist.sharding.support import Accumulate, Support
from trace_dist.utils import dist

IGNORED = "_ddp_params_and_buffers_to_ignore"
"""Where DDP looks for the names of what it must leave alone."""


def as_sharded(model: ShardedModel | nn.Module) -> ShardedModel:
    """The engine's view of a model, which it freezes: the one that is there already, with its mask, as long as it fits.

    Args:
        model: a sharded model (returned as it is), or one that is plain, wrapped by DDP, sharded by ``fully_shard`` (by
            hand or by accelerate) or by a DeepSpeed ZeRO-3 engine that has no optimizer; compiled by ``torch.compile`` or not.

    Raises:
        ValueError: DeepSpeed or FSDP1 already owns the gradients, or the model is sharded in a way with no single owner
            per entry, or its weights are quantised, lie on several devices, or have no values.
    """
    if isinstance(model, ShardedModel):
        return model
    layers = peel(model)
    refuse_quantised_module(layers[-1])
    refuse_tensor_parallel(layers[-1])
    refuse_scattered(layers[-1])
    if dist.local_device().type != "meta":  # as that of a simulated rank
        refuse_empty(layers[-1])
    lay_out(layers[-1])
    dist.init_distributed()
    around = [layer for layer in layers if isinstance(layer, DistributedDataParallel)]
    for ddp in around:
        _let_idle(ddp)
    if any(isinstance(layer, nn.DataParallel) for layer in layers):
        refuse_data_parallel()
    known = view_of(layers)
    if known is not None:
        if isinstance(known, PreparedModel) and not around:
            _check_same_weights(layers[-1])
        return known
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
    return PreparedModel(model)


def refuse_tensor_parallel(model: nn.Module) -> None:
    """Raise ValueError where weights are cut by tensor parallelism; those of ``fully_shard`` are its backend's to judge."""
    if any(isinstance(part, FSDPModule) for part in model.modules()):
        return
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"model: {name!r} is cut by tensor parallelism ({parameter.placements}); masked training needs whole weights, or "
                "dimension 0 cut over all ranks: give the model as it was before parallelize_module"
            )


class PreparedModel(ReplicatedModel):
    """A model of the caller's that every rank holds whole; DDP may be put around it at any time ([Note: DDP comes later])."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._undo: list[Callable[[], None]] = []
        self._frozen: list[tuple[str, Any]] = []
        """What no mask covers, where several ranks share the model."""

    def attach(self, mask: Mask, accumulate: Accumulate | None = None) -> list[Support]:
        supports = super().attach(mask, accumulate)
        self._attached_on = self.device
        self._undo.append(self.module.register_forward_pre_hook(_BeforeForward(self)).remove)
        if self.world > 1:
            self._undo.append(self._suit_ddp(supports))
        return supports

    def detach(self) -> None:
        super().detach()
        for undo in self._undo:
            undo()
        self._undo.clear()

    def _suit_ddp(self, supports: Sequence[Support]) -> Callable[[], None]:
        """Let DDP accept the model and keep buckets for no more than one parameter; returns the undo."""
        weights = [self._parameters[s.name] for s in self.dense(supports)] or [
            parameter for parameter in self._parameters.values() if parameter.is_floating_point()
        ]
        claims = min(weights, key=lambda weight: (not weight.requires_grad, weight.numel()))
        before = getattr(self.module, IGNORED, ())
        claims.requires_grad_(True)
        dropped = claims.register_post_accumulate_grad_hook(_drop)
        others = [name for name, p in self.module.named_parameters() if p is not claims]
        # The names that DDP sees, around the model itself or around what torch.compile makes of it.
        setattr(self.module, IGNORED, sorted({*before, *others, *(f"_orig_mod.{name}" for name in others)}))
        masked = {support.name for support in supports}
        self._frozen = [(n, p) for n, p in self._parameters.items() if n not in masked and p is not claims]

        def undo() -> None:
            dropped.remove()
            claims.requires_grad_(False)
            setattr(self.module, IGNORED, before)

        return undo

    def _before_forward(self) -> None:
        around = DistributedDataParallel._get_active_ddp_module()
        if around is not None and unwrap(around) is self.module:
            _let_idle(around)
            _check_even(around)
            self._check_frozen()
        if self.device != self._attached_on:
            raise ValueError(
                f"model: moved to {self.device} after MaskedAdamW was built on {self._attached_on}; move it first"
            )

    def _check_frozen(self) -> None:
        """Raise ValueError where a gradient would arise that DDP, whose reducer is idle, leaves different on each rank."""
        trained = [name for name, p in self._frozen if p.requires_grad] if torch.is_grad_enabled() else []
        if trained:
            raise ValueError(
                f"model: {trained[0]!r} requires a gradient beside the mask, which DDP would not sum over the ranks; add it to "
                "the mask, freeze it, or move it to a module with a DDP of its own"
            )


class _BeforeForward:
    """What a model's hook asks of its view; a copy of the model, in memory or in a file, has one that asks nothing."""

    def __init__(self, view: PreparedModel | None = None) -> None:
        self._view = view

    def __call__(self, *_: Any) -> None:
        if self._view is not None:
            self._view._before_forward()

    def __reduce__(self) -> tuple[Any, ...]:
        return _BeforeForward, ()


def _let_idle(ddp: Any) -> None:
    """Leave DDP's reducer idle: what ``no_sync`` sets, and, of a static graph, that its first pass has been reduced."""
    ddp.require_backward_grad_sync = False
    ddp._static_graph_delay_allreduce_enqueued = True


def _check_even(ddp: Any) -> None:
    """Raise ValueError under ``Join``: a rank out of batches would answer DDP's collectives, which are idle, and none of ours."""
    if ddp._join_config.enable and not ddp._join_config.throw_on_early_termination:
        raise ValueError(
            "model: DDP.join(), Join and accelerate's join_uneven_inputs let ranks run out of batches, and MaskedAdamW works on "
            "all ranks together; give each rank as many batches (drop_last, DistributedSampler, even_batches=True)"
        )


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


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
