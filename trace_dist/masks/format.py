"""The path by which people's scripts import ``Mask``."""

from trace_dist.masks.mask import Mask

__all__ = ["Mask"]
