"""Placement random: the proxy's budgets, at random places."""

from __future__ import annotations

from trace_dist.masks.ops import Scores, random_scores, tensor_seed
from trace_dist.projection.site import Site

label = "random places"


def scores(site: Site, options: None) -> Scores:
    """Scores of every unit of the target, from the seed; tasks get different places."""
    return seeded_scores(tensor_seed(site.seed, site.task))


def seeded_scores(seed: int) -> Scores:
    """Uniformly random scores, different in every tensor."""
    return lambda name, layout: random_scores(name, layout, seed)
