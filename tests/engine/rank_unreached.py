"""Training in which a layer has no gradient at times, on all ranks or on all but one, beside torch's AdamW."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from engine.toy import Toy, toy_inputs, toy_loss
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trace_dist import Mask, MaskedAdamW
from trace_dist.sharding import ShardedModel
from trace_dist.sharding.fsdp2 import Fsdp2Model
from trace_dist.sharding.zero3 import Zero3Model
from trace_dist.utils import dist

HYPER = {"lr": 1e-2, "eps": 1e-5, "weight_decay": 0.5}
LEFT_OUT = (1, 4)
"""Steps in which no rank runs the optional layer."""
UNEVEN = 2
"""The step in which the first rank alone runs it."""


def skips(step: int, rank: int, uneven: bool) -> bool:
    return step in LEFT_OUT or (uneven and step == UNEVEN and rank > 0)


def dense(num_ranks: int, uneven: bool) -> dict[str, Tensor]:
    """The weights that torch's AdamW arrives at, which skips a parameter whose ``grad`` is None."""
    model = Toy()
    weights = [value for name, value in model.named_parameters() if "weight" in name]
    optimizer = torch.optim.AdamW(weights, foreach=False, **HYPER)
    for step, inputs in enumerate(toy_inputs(num_ranks)):
        for rank, x in enumerate(inputs):
            (toy_loss(model(x, skip=skips(step, rank, uneven))) / num_ranks).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {name: value.detach() for name, value in model.named_parameters()}


def masked(
    model: ShardedModel | nn.Module, uneven: bool, **options: Any
) -> tuple[MaskedAdamW, dict[str, Tensor]]:
    """The same by a mask of all weights and no bias; the weights on rank 0."""
    mask = Mask.random(model, 1.0, maskable="weight")
    optimizer = MaskedAdamW(model, mask, **HYPER, **options)
    sharded = optimizer.model
    rank = dist.rank()
    for step, inputs in enumerate(toy_inputs(dist.world_size())):
        sharded.backward(toy_loss(sharded(inputs[rank], skip=skips(step, rank, uneven))))
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, sharded.full_state_dict()


def unreached(out: Path) -> dict[str, Any]:
    """Weights of every backend, on rank 0, and how often each parameter was updated, on every rank."""
    makers: dict[str, Callable[[], ShardedModel | nn.Module]] = {
        "zero3": lambda: Zero3Model(Toy()),
        "fsdp2": lambda: Fsdp2Model(Toy()),
        "plain": Toy,
        "ddp": lambda: DistributedDataParallel(Toy()),
    }
    found: dict[str, Any] = {}
    for name, make in makers.items():
        # ZeRO-3 wants the same modules in the same order on every rank.
        optimizer, state = masked(make(), uneven=name != "zero3")
        found[name] = {
            "state": {name: value.flatten().tolist() for name, value in state.items()},
            "steps": {support.name: entries["step"] for support, entries in optimizer.compact()},
        }
    return found
