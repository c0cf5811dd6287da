"""Kernels for masked training: Triton on GPUs, C++ or vectorised torch on CPU tensors, one file per op.

Depends on torch and triton alone.
"""

from .adamw_batch import AdamWBatch
from .bitmask import pack, unpack
from .blockwise import Blockwise, dequantize_blockwise, quantize_blockwise
from .compact import compact_gather, compact_gather_sumsq, compact_scatter, compact_sumsq
from .delta_swap import DeltaSwapBatch, delta_swap
from .gap_gather import chunk_starts, gap_gather
from .masked_adamw import masked_adamw
from .masked_adamw_8bit import masked_adamw_8bit
from .runs import Piece, Runs
from .unit_reduce import unit_dot, unit_sumsq

__all__ = [
    "AdamWBatch",
    "Blockwise",
    "DeltaSwapBatch",
    "Piece",
    "Runs",
    "chunk_starts",
    "compact_gather",
    "compact_gather_sumsq",
    "compact_scatter",
    "compact_sumsq",
    "delta_swap",
    "dequantize_blockwise",
    "gap_gather",
    "masked_adamw",
    "masked_adamw_8bit",
    "pack",
    "quantize_blockwise",
    "unit_dot",
    "unit_sumsq",
    "unpack",
]
