"""Arm ``snr``: the target is warm-started itself; the gradient's mean over its deviation."""

from __future__ import annotations

from trace_dist.studies.arm import Scored


class SNR(Scored):
    """Score snr."""

    label = "signal over noise"
    colour = "amber"
    score = "snr"


ARM = SNR
