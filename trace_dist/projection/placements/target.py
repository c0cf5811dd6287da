"""Placement target: the units with the largest squared gradients of the whole target, which compete in all its tensors.

One sharded pass at the base gives budgets and places; nothing of a proxy is read, and none is probed. What a proxy is worth shows
beside it.
"""

from __future__ import annotations

from trace_dist.masks.ops import Scores
from trace_dist.projection.placements import refine
from trace_dist.projection.placements.refine import num_batches
from trace_dist.projection.site import Site

__all__ = ["label", "needs_proxy", "num_batches", "scores"]

label = "root of the target's mean squared gradient, all tensors together"
needs_proxy = False


def scores(site: Site, options: None) -> Scores:
    """Scores of every unit of the target. Collective."""
    return refine.scores(site, options)
