"""Whether this CPU multiplies a model's data type far more slowly than fp32, as one without AVX-512 BF16 or AMX does bf16."""

from __future__ import annotations

import math
import time

import torch

from trace_dist.sharding.base import ShardedModel
from trace_dist.utils import dist
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)
LARGE = 20_000_000
"""Parameters of a model whose training is worth a hint."""
FAR = 2.0
"""Times as long."""


def hint_at_slow_dtype(model: ShardedModel, field: str) -> None:
    """Say so where a large model is trained on a CPU that multiplies its data type far more slowly than fp32.

    Args:
        model: the target.
        field: that sets its data type, as errors call it.
    """
    plain = model.dtype == torch.float32 or model.quantize != "none"
    if model.device.type != "cpu" or dist.rank() > 0 or plain:
        return
    if sum(math.prod(model.shape(name)) for name in model.names()) < LARGE:
        return
    times = times_as_long(model.dtype)
    if times > FAR:
        name = str(model.dtype).removeprefix("torch.")
        logger.warning(
            "%s=%s: this CPU takes about %.0f times as long to multiply it as float32, with which training is quicker "
            "and weights take %.0f times the memory",
            *(field, name, times, 4 / model.dtype.itemsize),
        )


def times_as_long(dtype: torch.dtype) -> float:
    """Time of a matrix product of this data type over that of fp32, on this CPU; some hundredths of a second are measured."""
    return _seconds(dtype) / _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """Of the quickest of some products of a batch and a layer."""
    batch, layer = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)

    def once() -> float:
        begin = time.perf_counter()
        torch.nn.functional.linear(batch, layer)
        return time.perf_counter() - begin

    return min(once() for _ in range(4))
