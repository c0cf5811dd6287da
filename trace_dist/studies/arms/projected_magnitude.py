"""Arm ``projected_magnitude``: the proxy's budgets; places by narrowing a pool of the target's largest weights."""

from __future__ import annotations

from trace_dist.studies.arm import Placed


class ProjectedMagnitude(Placed):
    """Placement narrow."""

    label = "projected, magnitude pool"
    warms = reads_proxy = True
    colour = "amber"
    placement = "narrow"
    pool = "magnitude"


ARM = ProjectedMagnitude
