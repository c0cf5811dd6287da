"""Placement narrow: adaptation-aware probing of the target.

A pool, a few times larger than wanted, is trained for some masked steps; its units are scored by the trace that they left, and
the values are put back. The pool holds the largest magnitudes of each tensor, or its largest gradients by one Fisher pass at the
base, or both: half of it the one, then the other of what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from trace_dist.config import MaskConfig, ProbeConfig, TrainConfig
from trace_dist.config.checks import Section, check
from trace_dist.data.batches import Batches
from trace_dist.masks.mask import Mask
from trace_dist.masks.ops import Scores, place
from trace_dist.masks.select import Units
from trace_dist.masks.units import UnitLayout
from trace_dist.probe.importance import Evidence, combined, element_energy, parts_of
from trace_dist.projection.budget import scale_budgets
from trace_dist.projection.placements.magnitude import magnitude_scores
from trace_dist.projection.placements.refine import fisher_scores
from trace_dist.projection.site import Site
from trace_dist.projection.unit_means import reduce_units
from trace_dist.sharding.base import ShardedModel
from trace_dist.train.learner import MaskedLearner
from trace_dist.train.loop import train_steps
from trace_dist.utils import dist

label = "trace of some masked steps on a pool"
OUTSIDE = -1.0
"""Score of units outside the pool; below every real score."""


@dataclass(frozen=True)
class Options(Section):
    """Options of the placement."""

    section: ClassVar[str] = "projection.options"

    pool: Literal["magnitude", "fisher", "both"] = "magnitude"
    """What the pool holds: the largest magnitudes, the largest gradients of one sharded pass at the base, or half of each."""
    pool_density: float = 0.10
    """Density of the pool, in (0, 1]."""
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
    pool, rule = options.pool_density, f"must be at least mask.density={mask.share}"
    cure = "raise the pool or choose another placement"
    check(pool >= mask.share, f"{options.where}.pool_density", pool, rule, cure)


def num_batches(options: Options, probe: ProbeConfig) -> int:
    """Batches of the task that the target is trained on or reads."""
    return options.steps + probe.fisher_batches * (1 if options.pool == "magnitude" else 2)


def scores(site: Site, options: Options) -> Scores:
    """Scores of every unit of the target. Collective."""
    return narrow_scores(
        site.model, _pool(site, options), site.batches(), options, site.probe, site.train, site.task
    )


def _pool(site: Site, options: Options) -> Mask:
    """What is trained. Collective."""
    found: Mask | None = None
    for share, scores in POOLS[options.pool](site):
        budgets = scale_budgets(site.budgets, site.layouts, share * options.pool_density)
        refused = dict(site.refused) if found is None else _with(site.refused, found.units)
        part = place(site.layouts, site.granularity, budgets, scores, refused)
        found = part if found is None else found | part
    if found is None:
        raise AssertionError(f"pool {options.pool!r} is made of nothing")
    return found


def _with(refused: Units, taken: Units) -> Units:
    """Both, of which no unit is in the other."""
    names = [*refused, *(name for name in taken if name not in refused)]
    parts = {name: [units[name].long() for units in (refused, taken) if name in units] for name in names}
    return {name: torch.cat(units).sort().values for name, units in parts.items()}


def _largest(site: Site) -> Scores:
    return magnitude_scores(site.model)


def _steepest(site: Site) -> Scores:
    return fisher_scores(site.model, site.layouts, site.batches(), site.probe.fisher_batches)


POOLS: dict[str, Callable[[Site], Sequence[tuple[float, Scores]]]] = {
    "magnitude": lambda site: [(1.0, _largest(site))],
    "fisher": lambda site: [(1.0, _steepest(site))],
    "both": lambda site: [(0.5, _largest(site)), (0.5, _steepest(site))],
}
"""By name, the shares that a pool consists of, and by what their units are chosen."""


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
    train_steps(learner, batches, train.strict(), options.steps, description=label, rate=rate)
    gradients = compact_gradients(learner, batches, probe.fisher_batches)
    parts, energies = parts_of(probe.score), {}
    pairs = zip(start, _mean_squares(start), gradients, strict=True)
    for support, (before, mean_square, (mean, squares)) in zip(optimizer.supports, pairs, strict=True):
        weight, after = (
            before.to(squares.device).float(),
            optimizer.values(support).to(squares.device).float(),
        )
        elements = pool.elements(support.name)[support.offset : support.offset + support.runs.num_entries]
        evidence = Evidence(weight, after - weight, mean, squares, mean_square=mean_square)
        energies[support.name] = [element_energy(evidence, part) for part in parts], elements
    optimizer.set_values(start)
    model.detach()
    return _pool_scores(model, pool, energies, probe.score)


def _mean_squares(values: Sequence[Tensor]) -> list[float]:
    """Of each parameter's values, of which every rank holds some. Collective."""
    sums = [
        torch.stack([each.double().square().sum(), each.new_tensor(len(each), dtype=torch.float64)])
        for each in values
    ]
    total, count = dist.sum_over_ranks(torch.stack(sums).to(dist.local_device())).cpu().unbind(1)
    return [float(mean) for mean in total / count.clamp(min=1)]


def _pool_scores(
    model: ShardedModel, pool: Mask, energies: Mapping[str, tuple[list[Tensor], Tensor]], score: str
) -> Scores:
    """Scores of the pool's units, OUTSIDE elsewhere. Collective.

    Args:
        model: the target.
        pool: whose units are scored.
        energies: parameter -> squared importances of this rank's elements, by each part of the score; and which elements.
        score: what the parts make.
    """

    def means(name: str, part: int) -> Tensor:
        local, elements = energies[name][0][part], energies[name][1]
        found = reduce_units(model, name, pool.layouts[name], local, elements.to(local.device)).sqrt()
        return found[pool.units[name].long()]

    num_parts = len(parts_of(score))
    whole = None
    if num_parts > 1:
        # Scaled over the whole pool, which every rank then holds: 4 bytes a unit.
        whole = combined(score, [{name: means(name, part) for name in energies} for part in range(num_parts)])

    def scores(name: str, layout: UnitLayout) -> Tensor:
        found = torch.full((layout.num_units,), OUTSIDE)
        if name in energies:
            found[pool.units[name].long()] = means(name, 0) if whole is None else whole[name]
        return found

    return scores


def compact_gradients(
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
