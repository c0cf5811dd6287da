"""Masks: unit layouts, selection, set operations, files."""

from trace_dist.masks.mask import Mask
from trace_dist.masks.units import UnitLayout

__all__ = ["Mask", "UnitLayout"]
