"""Kernels for masked training: Triton on GPUs, vectorised torch on CPU tensors, one file per op.

Depends on torch and triton alone.
"""

from .bitmask import pack, unpack
from .compact import compact_gather, compact_gather_sumsq, compact_scatter
from .delta_swap import delta_swap
from .masked_adamw import masked_adamw
from .runs import Piece, Runs
from .unit_reduce import unit_dot, unit_sumsq

__all__ = [
    "Piece",
    "Runs",
    "compact_gather",
    "compact_gather_sumsq",
    "compact_scatter",
    "delta_swap",
    "masked_adamw",
    "pack",
    "unit_dot",
    "unit_sumsq",
    "unpack",
]
