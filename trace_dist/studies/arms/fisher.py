"""Arm ``fisher``: one Fisher pass at the base of the target; no warm start, no proxy."""

from __future__ import annotations

from trace_dist.studies.arm import Placed


class Fisher(Placed):
    """Placement target."""

    label = "Fisher at the base"
    colour = "sky"
    placement = "target"


ARM = Fisher
