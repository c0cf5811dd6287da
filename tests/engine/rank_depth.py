"""One rank's check of how far down a backward pass goes: the weights that ZeRO-3 and FSDP2 gather for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from engine.cases import CASES, batches
from engine.training import train
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from trace_dist import Mask
from trace_dist.sharding import ShardedModel
from trace_dist.sharding.fsdp2 import Fsdp2Model
from trace_dist.sharding.zero3 import Zero3Model

UPPER = r"layers\.3.*(q_proj|down_proj)"


def depth(out: Path) -> dict[str, Any]:
    """``backend-checkpointed`` -> parameters (ZeRO-3) or modules (FSDP2) gathered in backward, masked in the last of 4 layers."""
    found = {}
    for checkpointing in (False, True):
        case = replace(CASES["element"], num_layers=4, checkpointing=checkpointing)
        found[f"zero3-{checkpointing}"] = gathered_by_zero3(Zero3Model(case.model(), 0), batches(case)[0][0])
        found[f"fsdp2-{checkpointing}"] = gathered_by_fsdp2(Fsdp2Model(case.model()), batches(case)[0][0])
    for kind in ("reentrant", "not reentrant"):
        found[kind] = [
            losses_recomputed(backend, kind == "reentrant") for backend in (Zero3Model, Fsdp2Model)
        ]
    return found


def losses_recomputed(backend: type[ShardedModel], reentrant: bool) -> list[float]:
    """Training with activation checkpoints of one kind."""
    case = CASES["block-accumulated-recomputed"]
    module = case.model()
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return train(case, backend(module)).losses


def gathered_by_zero3(model: Zero3Model, ids: Any) -> list[str]:
    """Names of the parameters that backward gathers."""
    name_of = {id(parameter): name for name, parameter in model._parameters.items()}
    gathered: list[str] = []
    all_gather = "_PartitionedParameterCoordinator__all_gather_params"
    original = getattr(PartitionedParameterCoordinator, all_gather)

    def spy(self: Any, params: set[Any], forward: bool) -> None:
        gathered.extend(name_of[id(p)] for p in params if p.ds_status.name == "NOT_AVAILABLE")
        original(self, params, forward)

    with patch.object(PartitionedParameterCoordinator, all_gather, spy):
        run(model, ids, gathered)
    model.close()
    return gathered


def gathered_by_fsdp2(model: Fsdp2Model, ids: Any) -> list[str]:
    """Names of the modules whose weights backward gathers."""
    gathered: list[str] = []
    original = FSDPParamGroup.unshard

    def spy(self: Any, async_op: bool = False) -> None:
        if self.is_sharded and self._all_gather_result is None:
            gathered.append(self._module_fqn)
        original(self, async_op)

    with patch.object(FSDPParamGroup, "unshard", spy):
        run(model, ids, gathered)
    return gathered


def run(model: ShardedModel, ids: Any, gathered: list[str]) -> None:
    """Forward and backward; ``gathered`` then holds what came in backward."""
    model.attach(Mask.random(model, 0.3, "element", maskable=UPPER))
    loss = model(input_ids=ids, labels=ids).loss
    gathered.clear()
    model.backward(loss)
