"""Placement narrow_target: as ``narrow``, but all tensors of the target compete and no proxy is read.

The pool holds the largest gradients of one sharded Fisher pass at the base, wherever they lie. It is trained for some masked
steps, and its units are scored by the trace that they left. So the target is probed without dense training, by passes of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trace_dist.masks.ops import Scores, compete
from trace_dist.projection.placements import narrow, refine
from trace_dist.projection.placements.narrow import check_mask, num_batches
from trace_dist.projection.site import Site

__all__ = ["Options", "check_mask", "label", "needs_proxy", "num_batches", "scores"]

label = "trace of some masked steps on a pool, all tensors together"
needs_proxy = False


@dataclass(frozen=True)
class Options(narrow.Options):
    """Options of the placement: those of ``narrow``; the pool is always made of gradients."""

    pool: Literal["fisher"] = "fisher"
    """What the pool holds: the largest gradients of one sharded pass at the base."""


def scores(site: Site, options: Options) -> Scores:
    """Scores of every unit of the target. Collective."""
    steepest = refine.scores(site, None)
    density = options.pool_density
    # So the pool has in every tensor what the mask may want there.
    spread = site.spread.scaled(max(1.0, density / site.density))
    pool = compete(site.layouts, site.granularity, density, steepest, spread, site.refused)
    return narrow.narrow_scores(site.model, pool, site.batches(), options, site.probe, site.train, site.task)
