"""Scores measured on the large model itself, in its shards, in compact memory.

``fisher_scores``: one pass of squared gradients per unit; no gradient is kept. ``narrow_scores``: adaptation-aware
probing: train a pool a few times larger than wanted for some masked steps, score its units by the trace they left,
put the values back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trace_dist.config import RunConfig
from trace_dist.data.batches import Batches
from trace_dist.masks.format import Mask
from trace_dist.masks.ops import Scores
from trace_dist.masks.units import UnitLayout
from trace_dist.probe.importance import element_energy
from trace_dist.projection.placement import reduce_units
from trace_dist.sharding.base import ShardedModel
from trace_dist.sharding.support import Support
from trace_dist.train.learner import MaskedLearner
from trace_dist.train.loop import train_steps
from trace_dist.train.loss import accumulate

OUTSIDE = -1.0
"""Score of units outside the pool; below every real score."""


def full_mask(layouts: dict[str, UnitLayout]) -> Mask:
    """Every maskable parameter as one unit."""
    whole = {name: UnitLayout(layout.shape, layout.numel) for name, layout in layouts.items()}
    return Mask({name: torch.zeros(1, dtype=torch.int32) for name in whole}, whole, "tensor")


def fisher_scores(
    model: ShardedModel, layouts: dict[str, UnitLayout], batches: Batches, num_batches: int
) -> Scores:
    """Root of the mean squared gradient of each unit at the present weights, over some global batches. Collective.

    No gradient is kept, so none can be added up over a step's micro-batches: each micro-batch (of all ranks together) is a
    sample of its own, scaled to the size of a step's gradient. With one micro-batch per step this is the warm start's Fisher.

    Memory on each rank: one number per unit it touches (fp32; fp64 for units of many elements, whose sums would lose
    small terms), and one bucket of gradients.
    """
    views = {name: model.views(name)[model.rank] for name in layouts}
    touched = {name: layouts[name].unit_range(view.start, view.stop) for name, view in views.items()}
    sums: dict[str, Tensor] = {}
    weight = 0.0

    def collect(support: Support, values: Tensor) -> None:
        layout, view = layouts[support.name], views[support.name]
        nearby = touched[support.name]
        units = layout.unit_of(torch.arange(view.start, view.stop, device=values.device)) - nearby.start
        dtype = torch.float32 if layout.unit == 1 else torch.float64
        if support.name not in sums:
            sums[support.name] = torch.zeros(len(nearby), dtype=dtype, device=values.device)
        sums[support.name].index_add_(0, units, values.to(dtype).square(), alpha=weight)

    model.attach(full_mask(layouts), collect)
    model.train()
    stream = iter(batches)
    for _ in range(num_batches):
        step = next(stream)
        weight = len(step.micro_batches) / num_batches
        accumulate(step, model, lambda loss: model.backward(loss, reduction="sum"), model.device)
    model.detach()

    def scores(name: str, layout: UnitLayout) -> Tensor:
        units = torch.tensor(touched[name], device=model.device)
        local = sums.get(name, torch.zeros(len(units), device=model.device))
        return reduce_units(model, name, layout, local, units, by_unit=True).sqrt()

    return scores


def narrow_scores(
    model: ShardedModel, pool: Mask, batches: Batches, cfg: RunConfig, description: str = "narrow"
) -> Scores:
    """Importance of the pool's units after some masked steps on it; the model is put back bit for bit. Collective."""
    learner = MaskedLearner(model, pool, cfg.train, lr=cfg.projection.narrow_lr)
    optimizer = learner.optimizer
    start = [optimizer.values(support).clone() for support in optimizer.supports]
    steps, rate = cfg.projection.narrow_steps, "projection.narrow_lr"
    train_steps(learner, batches, cfg.train, steps, description=description, rate=rate)
    fisher = _compact_fisher(learner, batches, cfg.probe.fisher_batches)
    energy = {}
    for support, before, squares in zip(optimizer.supports, start, fisher, strict=True):
        update = optimizer.values(support).float() - before.float()
        local = element_energy(update.to(squares.device), squares, cfg.probe.score)
        offset = support.offset
        elements = pool.elements(support.name)[offset : offset + support.runs.num_entries]
        energy[support.name] = (local, elements)
    optimizer.set_values(start)
    model.detach()

    def scores(name: str, layout: UnitLayout) -> Tensor:
        if name not in energy:
            return torch.full((layout.num_units,), OUTSIDE)
        local, elements = energy[name]
        values = reduce_units(model, name, layout, local, elements.to(local.device)).sqrt()
        inside = torch.zeros(layout.num_units, dtype=torch.bool)
        inside[pool.units[name].long()] = True
        return torch.where(inside, values, torch.tensor(OUTSIDE))

    return scores


def _compact_fisher(learner: MaskedLearner, batches: Batches, num_batches: int) -> list[Tensor]:
    """Mean squared gradient at each entry of this rank's supports."""
    supports = learner.optimizer.supports
    fisher = [torch.zeros_like(support.grad) for support in supports]
    stream = iter(batches)
    for _ in range(num_batches):
        learner.accumulate(next(stream))
        for support, total in zip(supports, fisher, strict=True):
            total.addcmul_(support.grad, support.grad, value=1 / num_batches)
        learner.optimizer.zero_grad()
    return fisher
