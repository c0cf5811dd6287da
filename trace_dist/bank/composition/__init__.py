"""Ways of making one delta out of several."""

from trace_dist.bank.composition.compose import COMPOSITIONS, compose

__all__ = ["COMPOSITIONS", "compose"]
