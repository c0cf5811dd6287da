"""Arm ``projected``: the proxy's budgets; places by narrowing a pool of the target's largest gradients."""

from __future__ import annotations

from trace_dist.studies.arm import Placed


class Projected(Placed):
    """Placement narrow."""

    label = "projected, Fisher pool"
    warms = reads_proxy = True
    colour = "vermillion"
    placement = "narrow"
    pool = "fisher"


ARM = Projected
