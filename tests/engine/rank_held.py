"""One rank's check that weights held whole answer as gathered ones do, ask nobody, and leave training as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from engine.cases import CASES, batches
from engine.training import make_optimizer, train_step
from torch import Tensor

from trace_dist.evaluation.passes import evaluating, map_over_ranks
from trace_dist.sharding import ShardedModel
from trace_dist.sharding.fsdp2 import Fsdp2Model
from trace_dist.sharding.zero3 import Zero3Model
from trace_dist.utils import dist, held

CASE = replace(CASES["element"], threshold=40)
"""Norms stay gathered on purpose, matrices do not."""


def holding(out: Path) -> dict[str, Any]:
    """Backend -> what a run found that evaluates between its steps with weights held, and one that never holds them."""
    found = {}
    for backend in (Zero3Model, Fsdp2Model):
        rows = {}
        for name, share in (("held", held.SHARE), ("gathered", 0.0)):
            with patch.object(held, "SHARE", share):
                rows[name] = train_and_look(backend(CASE.model()))
        found[backend.backend] = rows
    return found


def train_and_look(model: ShardedModel) -> dict[str, Any]:
    optimizer = make_optimizer(CASE, model)
    losses, looks, left = [], [], []
    for batch in batches(CASE)[:4]:
        losses.append(train_step(CASE, model, optimizer, batch))
        before = sum(copy.numel() for copy in model.copies())
        alone, logits = look(model, batch[0])
        changed, again = look_at_changed_weights(model, optimizer, batch[0])
        looks.append({"alone": alone, "sum": float(logits.double().sum()), "changed": changed, "same": again})
        left.append(sum(copy.numel() for copy in model.copies()) - before)
    model.detach()
    return {"losses": losses, "looks": looks, "left": left}


def look(model: ShardedModel, ids: Tensor) -> tuple[bool, Tensor]:
    """Logits of five batches, of which rank 0 has one more than rank 1: alone, where the weights are held."""

    def run(rows: list[int]) -> list[Tensor]:
        with evaluating(model.module) as within:
            assert within == alone
            return list(model.module(input_ids=ids[rows]).logits)

    with evaluating(model.module) as alone:
        return alone, torch.stack(map_over_ranks([ids.shape[1]] * 5, 1, run, alone))


def look_at_changed_weights(model: ShardedModel, optimizer: Any, ids: Tensor) -> tuple[float, bool]:
    """The sum of all logits after a change of weights inside the block, and whether it equals that after the block."""
    values = [optimizer.values(support).clone() for support in optimizer.supports]
    with evaluating(model.module):
        optimizer.set_values([value + 0.01 for value in values])
        inside = model.module(input_ids=ids).logits
    with evaluating(model.module):
        outside = model.module(input_ids=ids).logits
    optimizer.set_values(values)
    same = torch.equal(inside, outside)
    return float(dist.sum_over_ranks(inside.double().sum())), same
