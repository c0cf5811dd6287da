"""Arm ``full``: all weights are trained."""

from __future__ import annotations

from trace_dist.studies.arm import Method


class Full(Method):
    """Method full."""

    label = "full fine-tuning"
    colour = "ink"
    method = "full"


ARM = Full
