"""How far the peak of a training may lie from what is predicted of it.

*Low* is the predicted peak of tensors alone. *Expected* adds the reserve of the GPU's memory, by which is told what fits. *High*
adds to that the largest error that was measured, and gathered blocks that wait to be freed ([Note: blocks ahead] in
``sharding.throttle``). It is no promise: the errors are of a few models on CPUs, of GPUs one has run, and what an allocator cuts
into pieces is the reserve's. DeepSpeed as others use it holds no host back, so peers may have more blocks that wait.
"""

from __future__ import annotations

from typing import NamedTuple

from trace_dist.config import Backend
from trace_dist.profiling.simulation.setup import RESERVE_GIB
from trace_dist.sharding.throttle import AHEAD

ESTIMATE_ERROR = 0.026
"""Of an estimated peak: measured ones were at most so much larger (docs/results/bench_memory.json)."""
SIMULATION_ERROR = 0.056
"""The same of a simulated peak of full fine-tuning or LoRA (docs/results/bench_simulate.json)."""


def fits(peak: float, gpu_gib: float, reserve_gib: float = RESERVE_GIB) -> bool:
    """Whether a GPU has room for a predicted peak, in bytes, and the reserve."""
    return peak + reserve_gib * 2**30 <= gpu_gib * 2**30


class Bounds(NamedTuple):
    """Bytes on one GPU.

    Attributes:
        low: tensors alone.
        expected: with the reserve.
        high: with what may come to that.
    """

    low: float
    expected: float
    high: float


def bounds(peak: float, reserve: float, error: float, waiting: float) -> Bounds:
    """The bounds of one peak.

    Args:
        peak: predicted, bytes.
        reserve: bytes that are left free.
        error: share of the peak, such as ``ESTIMATE_ERROR``.
        waiting: bytes of ``waiting_bytes``.
    """
    return Bounds(peak, peak + reserve, peak * (1 + error) + reserve + waiting)


def waiting_bytes(block_bytes: int, backend: Backend, world_size: int) -> int:
    """The most bytes of gathered blocks that the host has freed and the accelerator still uses.

    One process gathers nothing. FSDP2 takes and frees gathered weights in the order of the accelerator's own work: none waits.

    Args:
        block_bytes: of the largest decoder block.
        backend: how the model is spread.
        world_size: ranks.
    """
    return AHEAD * block_bytes if backend == "zero3" and world_size > 1 else 0
