"""Masks: unit layouts, set operations, selection, files."""

from trace_dist.masks.format import Mask
from trace_dist.masks.units import UnitLayout

__all__ = ["Mask", "UnitLayout"]
