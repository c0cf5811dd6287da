"""The clock of the benchmarks."""

from __future__ import annotations

import time

import torch

from trace_dist.utils import dist


def now() -> float:
    """Seconds, once this rank's device is through with all that it was given."""
    if dist.local_device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
