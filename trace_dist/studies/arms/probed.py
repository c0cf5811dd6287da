"""Arm ``probed``: the target is warm-started itself; update times the root of the mean squared gradient."""

from __future__ import annotations

from trace_dist.studies.arm import Scored


class Probed(Scored):
    """Score l2_fisher."""

    label = "probed on the target"
    colour = "blue"
    score = "l2_fisher"


ARM = Probed
