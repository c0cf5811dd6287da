"""Arm ``budgets``: what the proxy's budgets alone are worth."""

from __future__ import annotations

from trace_dist.studies.arm import Placed


class Budgets(Placed):
    """Placement random."""

    label = "the proxy's budgets, random places"
    warms = reads_proxy = True
    colour = "pink"
    placement = "random"


ARM = Budgets
