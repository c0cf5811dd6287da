"""The clock of the benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trace_dist.utils import dist


def now() -> float:
    """Seconds, once this rank's device is through with all that it was given."""
    if dist.local_device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def median_of(runs: Sequence[Mapping[str, Any]], key: str) -> float:
    """The median of a list that each run has, over all runs."""
    return statistics.median(value for run in runs for value in run[key])
