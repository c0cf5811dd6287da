"""``random``: as ``retrieved``, with random masks of the same density; what is left of a difference is what probing brings."""

from __future__ import annotations

from trace_dist.continual.methods.retrieved import Options, Retrieved

__all__ = ["METHOD", "Options", "Random"]


class Random(Retrieved):
    """A bank of deltas on random masks."""

    label = "random mask"
    colour = "grey"
    masks = "random"


METHOD = Random
