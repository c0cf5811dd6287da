"""Placement narrow: adaptation-aware probing of the target.

A pool of the largest magnitudes, a few times larger than wanted, is trained for some masked steps; its units are scored by the
trace that they left, and the values are put back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trace_dist.config import MaskConfig, ProbeConfig, TrainConfig
from trace_dist.config.checks import Section, check
from trace_dist.data.batches import Batches
from trace_dist.masks.mask import Mask
from trace_dist.masks.ops import Scores, place
from trace_dist.masks.units import UnitLayout
from trace_dist.probe.importance import Evidence, element_energy
from trace_dist.projection.budget import scale_budgets
from trace_dist.projection.placements.magnitude import magnitude_scores
from trace_dist.projection.site import Site
from trace_dist.projection.unit_means import reduce_units
from trace_dist.sharding.base import ShardedModel
from trace_dist.train.learner import MaskedLearner
from trace_dist.train.loop import train_steps

label = "trace of some masked steps on a pool"
OUTSIDE = -1.0
"""Score of units outside the pool; below every real score."""


@dataclass(frozen=True)
class Options(Section):
    """Options of the placement."""

    section: ClassVar[str] = "projection.options"

    pool_density: float = 0.10
    """Density of the pool of largest magnitudes, in (0, 1]."""
    steps: int = 40
    """Masked steps on the pool."""
    lr: float = 1e-3
    """Peak learning rate of those steps."""

    def check(self) -> None:
        self.at_least(1, "steps")
        self.positive("lr")
        pool, name = self.pool_density, f"{self.where}.pool_density"
        check(0 < pool <= 1, name, pool, "must lie in (0, 1]", "use 2 to 4 times mask.density")


def check_mask(options: Options, mask: MaskConfig) -> None:
    """Raise ``ValueError`` where the pool cannot hold a mask of the wanted density."""
    pool, rule = options.pool_density, f"must be at least mask.density={mask.density}"
    cure = "raise the pool or choose another placement"
    check(pool >= mask.density, f"{options.where}.pool_density", pool, rule, cure)


def scores(site: Site, options: Options) -> Scores:
    """Scores of every unit of the target. Collective."""
    pool_budgets = scale_budgets(site.budgets, site.layouts, options.pool_density)
    pool = place(site.layouts, site.granularity, pool_budgets, magnitude_scores(site.model), site.refused)
    return narrow_scores(site.model, pool, site.batches(), options, site.probe, site.train, site.task)


def narrow_scores(
    model: ShardedModel,
    pool: Mask,
    batches: Batches,
    options: Options,
    probe: ProbeConfig,
    train: TrainConfig,
    task: str = "",
) -> Scores:
    """Importance of the pool's units after some masked steps on it; the model is put back bit for bit. Collective.

    Args:
        model: the target.
        pool: what is trained.
        batches: the task's.
        options: steps and learning rate.
        probe: how importance is read from the trace.
        train: the remaining options of the loop.
        task: its name, for progress and errors.
    """
    learner = MaskedLearner(model, pool, train, lr=options.lr)
    optimizer = learner.optimizer
    start = [optimizer.values(support).clone() for support in optimizer.supports]
    label, rate = f"narrow {task}".rstrip(), f"{options.where}.lr"
    train_steps(learner, batches, train, options.steps, description=label, rate=rate)
    gradients = _compact_gradients(learner, batches, probe.fisher_batches)
    energy = {}
    for support, before, (mean, squares) in zip(optimizer.supports, start, gradients, strict=True):
        weight, after = (
            before.to(squares.device).float(),
            optimizer.values(support).to(squares.device).float(),
        )
        local = element_energy(Evidence(weight, after - weight, mean, squares), probe.score)
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


def _compact_gradients(
    learner: MaskedLearner, batches: Batches, num_batches: int
) -> list[tuple[Tensor, Tensor]]:
    """Mean gradient and mean squared gradient at each entry of this rank's supports."""
    supports = learner.optimizer.supports
    found = [(torch.zeros_like(support.grad), torch.zeros_like(support.grad)) for support in supports]
    stream = iter(batches)
    for _ in range(num_batches):
        learner.accumulate(next(stream))
        for support, (mean, squares) in zip(supports, found, strict=True):
            mean.add_(support.grad, alpha=1 / num_batches)
            squares.addcmul_(support.grad, support.grad, value=1 / num_batches)
        learner.optimizer.zero_grad()
    return found
