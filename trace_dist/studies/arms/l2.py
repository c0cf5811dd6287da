"""Arm ``l2``: the target is warm-started itself; the size of the update alone."""

from __future__ import annotations

from trace_dist.studies.arm import Scored


class L2(Scored):
    """Score l2."""

    label = "size of the update"
    colour = "sky"
    score = "l2"


ARM = L2
