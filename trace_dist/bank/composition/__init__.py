"""Ways of making one delta out of several."""

from trace_dist.bank.composition.compose import compose

__all__ = ["compose"]
