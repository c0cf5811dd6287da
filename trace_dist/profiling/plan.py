"""Which ways of training a model fit into given GPUs, the most faithful first.

Two things are given up for memory: quality (density, the moments' precision, the fp32 master copy) and speed (offloading,
recomputed activations, small micro-batches). The answer is the Pareto front of both: an option is listed when nothing
that is listed above it offloads as little, recomputes as little and has as large a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, inf
from typing import Literal

from trace_dist.config import StateDtype
from trace_dist.profiling.bounds import ESTIMATE_ERROR, bounds, waiting_bytes
from trace_dist.profiling.disk import disk_bytes
from trace_dist.profiling.estimate import Estimator
from trace_dist.profiling.memory_setup import MemorySetup
from trace_dist.profiling.selection import selections
from trace_dist.profiling.simulation.setup import RESERVE_GIB

GIB = 2**30
DENSITIES = (0.2, 0.1, 0.05, 0.02, 0.01)
STATES: tuple[tuple[StateDtype, bool], ...] = (
    ("float32", True),
    ("bfloat16", True),
    ("8bit", True),
    ("bfloat16", False),
    ("8bit", False),
)
"""(state_dtype, master), from the most precise on."""
WAYS: tuple[tuple[Literal["none", "cpu"], bool], ...] = (
    ("none", False),
    ("none", True),
    ("cpu", False),
    ("cpu", True),
)
"""(offload, activation_checkpointing)."""
MICRO_BATCHES = (32, 16, 8, 4, 2, 1)
MOST_GPUS = 4096


@dataclass(frozen=True)
class Option:
    """One way of training that fits.

    Attributes:
        setup: the way.
        gib: expected peak on one GPU, the reserve included; by it is told what fits.
        low_gib: the predicted peak without the reserve.
        high_gib: the expected peak and what may come to it (profiling/bounds.py); an option may fit at ``gib`` alone.
        headroom_gib: what is left at the expected peak.
        host_gib: host memory per rank.
        loading_gib: host memory per rank while a checkpoint is read; mapped files, which the system lets go of, apart.
        checkpoint_gib: one checkpoint on disk, of all ranks; two are kept.
        delta_gib: what the task adds to the bank.
    """

    setup: MemorySetup
    gib: float
    low_gib: float
    high_gib: float
    headroom_gib: float
    host_gib: float
    loading_gib: float
    checkpoint_gib: float
    delta_gib: float


def plan(base: MemorySetup, gpu_gib: float, reserve_gib: float = RESERVE_GIB) -> list[Option]:
    """The options that fit, most faithful first.

    Args:
        base: model, mask units, backend, number of GPUs (``world_size``) and length; what ``Option.setup`` varies is ignored.
        gpu_gib: memory of one GPU.
        reserve_gib: of that, for the CUDA context, communication buffers and fragmentation.

    Raises:
        ValueError: nothing fits; says what would. Or no density of a plan selects anything.
    """
    if not 0 <= reserve_gib < gpu_gib < inf:
        raise ValueError(
            f"gpu_gib={gpu_gib}: must be more than reserve_gib={reserve_gib}; give the memory of one GPU in GiB"
        )
    estimator = Estimator(base.model, base.dtype, base.quantize)
    found: list[Option] = []
    qualities = list(_qualities(base, estimator))
    for quality in qualities:
        for way in _ways(quality, estimator):
            sizes = (replace(way, micro_batch_size=size) for size in MICRO_BATCHES)
            options = (_option(estimator, setup, gpu_gib, reserve_gib) for setup in sizes)
            largest = next((option for option in options if option.headroom_gib >= 0), None)
            if largest is not None and not any(
                _at_least_as_fast(other.setup, largest.setup) for other in found
            ):
                found.append(largest)
    if not found:
        raise ValueError(_nothing_fits(estimator, _leanest(qualities[-1], estimator), gpu_gib, reserve_gib))
    return found


def _qualities(base: MemorySetup, estimator: Estimator) -> Iterator[MemorySetup]:
    """Those of which a mask selects something: of a small model's tensors or heads a low density selects none."""
    layouts = estimator.layouts(base.granularity, base.block, base.maskable)
    densities = [density for density in DENSITIES if selections(layouts, density)]
    if not densities:
        raise ValueError(
            f"granularity={base.granularity!r}: at density {DENSITIES[0]} and below not one unit of this model is selected; use "
            "row or element"
        )
    for density in densities:
        for state_dtype, master in STATES:
            if master or base.dtype == "bfloat16":
                yield replace(base, density=density, state_dtype=state_dtype, master=master)


def _ways(quality: MemorySetup, estimator: Estimator) -> Iterator[MemorySetup]:
    yield from (
        replace(quality, offload=offload, activation_checkpointing=checkpointing)
        for offload, checkpointing in WAYS
        if estimator.module.supports_gradient_checkpointing or not checkpointing
    )


def _at_least_as_fast(one: MemorySetup, other: MemorySetup) -> bool:
    return (
        one.micro_batch_size >= other.micro_batch_size
        and one.activation_checkpointing <= other.activation_checkpointing
        and (one.offload == "none" or other.offload == "cpu")
    )


def _leanest(quality: MemorySetup, estimator: Estimator) -> MemorySetup:
    *_, way = _ways(quality, estimator)
    return replace(way, micro_batch_size=1)


def _option(estimator: Estimator, setup: MemorySetup, gpu_gib: float, reserve_gib: float) -> Option:
    estimate = estimator(setup)
    waiting = waiting_bytes(estimator.block_bytes, setup.backend, setup.world_size)
    sizes = bounds(estimate.peak, reserve_gib * GIB, ESTIMATE_ERROR, waiting)
    low, gib, high = (size / GIB for size in sizes)
    disk = disk_bytes(estimator, setup)
    host = sum(estimate.host.values()) / GIB
    loading = loading_bytes(estimator, setup) / GIB
    on_disk = disk.checkpoint / GIB, disk.delta / GIB
    return Option(setup, gib, low, high, gpu_gib - gib, host, loading, *on_disk)


def loading_bytes(estimator: Estimator, setup: MemorySetup) -> int:
    """Of the host, per rank, while weights are read: one process holds all of them before they move to its device; of many, each
    reads its part of one parameter after the other (models/loading.py)."""
    sizes = [parameter.numel() * parameter.element_size() for parameter in estimator.module.parameters()]
    return sum(sizes) if setup.backend == "single" else ceil(max(sizes) / setup.world_size)


def _nothing_fits(estimator: Estimator, leanest: MemorySetup, gpu_gib: float, reserve_gib: float) -> str:
    needed = _option(estimator, leanest, gpu_gib, reserve_gib).gib
    gpus = gpus_now = leanest.world_size
    while leanest.backend != "single" and gpus < MOST_GPUS:
        gpus *= 2
        setup = replace(leanest, world_size=gpus)
        if _option(estimator, setup, gpu_gib, reserve_gib).headroom_gib >= 0:
            break
    else:
        gpus = 0
    cure = (
        f"GPUs of {ceil(needed)} GiB"
        + (f", {gpus} GPUs of this size" if gpus else "")
        + " or shorter sequences"
    )
    recomputed = "recomputed activations, " if leanest.activation_checkpointing else ""
    return (
        f"gpu_gib={gpu_gib:g}: nothing fits: the leanest option (density {leanest.density}, {leanest.state_dtype} states, "
        f"master {str(leanest.master).lower()}, offload {leanest.offload}, {recomputed}micro-batch 1) needs "
        f"{needed:.1f} GiB on {'one GPU' if gpus_now == 1 else f'each of {gpus_now} GPUs'}; use {cure}"
    )
