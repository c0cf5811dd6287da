"""Arm ``narrowed``: one Fisher pass at the base of the target, a pool, some masked steps on it; no proxy."""

from __future__ import annotations

from trace_dist.studies.arm import Placed


class Narrowed(Placed):
    """Placement narrow_target."""

    label = "Fisher pool on the target, narrowed"
    colour = "green"
    placement = "narrow_target"


ARM = Narrowed
