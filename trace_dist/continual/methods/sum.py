"""``sum``: the sum of the deltas' changes, for comparison."""

from __future__ import annotations

from trace_dist.continual.methods.composed import Composed


class TaskArithmetic(Composed):
    """Task arithmetic."""

    label = "task arithmetic"
    kind = "sum"


METHOD = TaskArithmetic
