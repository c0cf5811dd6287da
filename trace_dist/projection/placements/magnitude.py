"""Placement magnitude: the places with the largest weights."""

from __future__ import annotations

from trace_dist.masks.ops import Scores
from trace_dist.projection.site import Site
from trace_dist.projection.unit_means import reduce_units
from trace_dist.sharding.base import ShardedModel

label = "mean absolute weight"


def scores(site: Site, options: None) -> Scores:
    """Scores of every unit of the target. Collective."""
    return magnitude_scores(site.model)


def magnitude_scores(model: ShardedModel) -> Scores:
    """Mean absolute weight of each unit."""
    return lambda name, layout: reduce_units(model, name, layout, model.values(name).float().abs())
