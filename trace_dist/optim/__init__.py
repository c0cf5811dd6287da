"""Optimizers over masks."""

from trace_dist.optim.masked_adamw import MaskedAdamW

__all__ = ["MaskedAdamW"]
