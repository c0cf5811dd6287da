"""``average``: the average of the models that the deltas stand for, for comparison."""

from __future__ import annotations

from trace_dist.continual.methods.composed import Composed


class Average(Composed):
    """Average."""

    label = "average"
    kind = "average"


METHOD = Average
