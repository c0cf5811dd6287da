"""What weights can be loaded as: their data type, and how linear layers are kept."""

from __future__ import annotations

from typing import get_args

import torch

from trace_dist.config.checks import check
from trace_dist.config.model import Dtype, Quantize


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Data type of weights, given by its name or as torch's. Raises ValueError unless it is float32 or bfloat16."""
    known: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(Dtype)}
    name = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    check(name in known, "dtype", dtype, "unknown", f"use {' or '.join(known)}")
    return known[name]


def check_quantize(quantize: str) -> None:
    """Raise ValueError unless linear layers can be kept so."""
    known = get_args(Quantize)
    check(quantize in known, "quantize", quantize, "unknown", f"use {' or '.join(known)}")
