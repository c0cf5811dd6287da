"""Predicted times beside what ``memory plan`` lists, and what full fine-tuning and LoRA would take of the same GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from trace_dist.benchmarks.contestants import OFFLOAD
from trace_dist.benchmarks.simulate import simulate
from trace_dist.models.architecture import empty_model
from trace_dist.profiling.estimate import load_config
from trace_dist.profiling.memory_setup import MemorySetup
from trace_dist.profiling.plan import GIB, MICRO_BATCHES, Option
from trace_dist.profiling.simulation.gpus import load_gpu
from trace_dist.profiling.simulation.setup import SimulationSetup

PEERS = ("full", "LoRA")
GPUS_PER_NODE = 8
BLOCK = 64
"""Elements of the blocks that are simulated."""
Found = dict[str, Any]


def method_of(setup: MemorySetup) -> str:
    """The simulated method of a mask.

    Raises:
        ValueError: there is none.
    """
    if setup.granularity == "block" and setup.block == BLOCK:
        return f"block {BLOCK}"
    if setup.granularity in ("element", "row"):
        return setup.granularity
    raise ValueError(
        f"granularity={setup.granularity!r}, block={setup.block}: no time is predicted for these masks; leave gpu out, or use "
        f"element, row, or block with block {BLOCK}"
    )


def check_times(
    setup: MemorySetup, gpu: str, link_gbps: float, price: float | None = None
) -> SimulationSetup:
    """What is simulated of a plan, but for what its options vary; nothing is built.

    Args:
        setup: what is planned; ``world_size`` GPUs.
        gpu: name or file.
        link_gbps: network of each GPU.
        price: dollars per GPU and hour.

    Raises:
        ValueError: no time is predicted for such masks, backends, weights or GPUs, or the GPUs do not fill nodes.
    """
    method = method_of(setup)
    for name, known in (
        ("backend", "zero3"),
        ("quantize", "none"),
        ("dtype", "bfloat16"),
        ("maskable", "linear"),
    ):
        value = getattr(setup, name)
        if value != known:
            raise ValueError(
                f"{name}={value!r}: times are predicted for backend zero3, unquantised bfloat16 weights and maskable linear; "
                f"leave gpu out, or use {known}"
            )
    gpus = setup.world_size
    if gpus > GPUS_PER_NODE and gpus % GPUS_PER_NODE:
        raise ValueError(
            f"gpus={gpus}: must fill nodes of {GPUS_PER_NODE} GPUs where there are more; use a multiple"
        )
    load_gpu(gpu)
    per_node = min(gpus, GPUS_PER_NODE)
    return SimulationSetup(
        *(setup.model, gpus // per_node, per_node, gpu, link_gbps),
        methods=(method,),
        sequence_length=setup.sequence_length,
        sequence_parallel=setup.sequence_parallel,
        price=price,
    )


def plan_times(
    options: Sequence[Option],
    gpu: str,
    link_gbps: float,
    gpu_gib: float,
    reserve_gib: float = 0.0,
    price: float | None = None,
) -> list[Found]:
    """One row per option and per way of training each peer: ``name``, what it is, ``peak_bytes`` with the reserve, whether that
    ``fits``, and ``step_s``, ``tokens_per_s`` and perhaps ``tokens_per_dollar`` as ``simulate`` finds them.

    All states are simulated in fp32, so the peak of an option is that of ``plan``; that of a peer is simulated. A peer gets the
    largest micro-batch that fits, and with recomputed activations another one where that lets a larger one fit. A peer that
    fits in no way has its leanest.

    Args:
        options: of ``plan``.
        gpu: name or file.
        link_gbps: network of each GPU.
        gpu_gib: memory of one GPU.
        reserve_gib: of that, for other things.
        price: dollars per GPU and hour.

    Raises:
        ValueError: see ``check_times``.
    """
    base = check_times(options[0].setup, gpu, link_gbps, price)
    (method,) = base.methods

    @cache
    def simulated(name: str, density: float, micro_batch: int, recomputes: bool) -> Found:
        way: dict[str, Any] = {
            "density": density,
            "micro_batch_size": micro_batch,
            "activation_checkpointing": recomputes,
        }
        found = simulate(replace(base, methods=(name,), **way))["methods"][name]
        times = ("step_s", "tokens_per_s", "tokens_per_dollar")
        peak = found["peak_bytes"] + reserve_gib * GIB
        return {"name": name, **way, "peak_bytes": peak, **{key: found[key] for key in times if key in found}}

    rows: list[Found] = []
    for option in options:
        setup = option.setup
        name = method if setup.offload == "none" else f"{method}{OFFLOAD}"
        row = simulated(name, setup.density, setup.micro_batch_size, setup.activation_checkpointing)
        row = {**row, "peak_bytes": option.gib * GIB}
        if all(row["name"] != other["name"] or _way(row) != _way(other) for other in rows):
            rows.append(row)
    density = options[0].setup.density
    recomputing = _recomputing(base.model)
    for name in PEERS:
        rows += _of_peer(lambda *way, name=name: simulated(name, density, *way), recomputing, gpu_gib * GIB)
    return [{**row, "fits": row["peak_bytes"] <= gpu_gib * GIB} for row in rows]


def _way(row: Found) -> tuple[Any, ...]:
    return row["density"], row["micro_batch_size"], row["activation_checkpointing"]


def _recomputing(model: str) -> tuple[bool, ...]:
    """Whether activations can be kept, or recomputed as well."""
    module = empty_model(load_config(model), torch.bfloat16, f"model={model!r}")
    return (False, True) if module.supports_gradient_checkpointing else (False,)


def _of_peer(simulated: Callable[..., Found], recomputing: Sequence[bool], room: float) -> Iterator[Found]:
    """The ways of training a peer that fit; its leanest where none does."""
    before = 0
    for recomputes in recomputing:
        largest = largest_fitting(lambda size: simulated(size, recomputes)["peak_bytes"], room)  # noqa: B023
        if largest > before:
            yield simulated(largest, recomputes)
        before = max(before, largest)
        if before == MICRO_BATCHES[0]:
            return
    if not before:
        yield simulated(1, recomputing[-1])


def largest_fitting(peak: Callable[[int], float], room: float) -> int:
    """The largest of ``MICRO_BATCHES`` whose peak fits; 0 where none does.

    A peak takes a while to find, so those that cannot fit are not asked for: peaks grow at least in a straight line, since each
    is the most of several moments, all of which do.
    """
    one = peak(1)
    if one > room:
        return 0
    each = peak(2) - one
    sizes = (size for size in MICRO_BATCHES if size == 1 or one + (size - 1) * each <= room)
    return next(size for size in sizes if peak(size) <= room)
