"""Predicted times beside what ``memory plan`` lists, and what full fine-tuning and LoRA would take of the same GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trace_dist.benchmarks.contestants import OFFLOAD
from trace_dist.benchmarks.plan_peers import check_simulated, peer_rows, simulated_ways, told_fitting
from trace_dist.benchmarks.simulate import simulate
from trace_dist.profiling.memory_setup import MemorySetup
from trace_dist.profiling.plan import GIB, Option
from trace_dist.profiling.simulation.gpus import load_gpu
from trace_dist.profiling.simulation.setup import SimulationSetup

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
    check_simulated(setup, "times are predicted", "leave gpu out, or ")
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
    peers: bool = True,
) -> list[Found]:
    """One row per option and per way of training each peer: ``name``, what it is, ``peak_bytes`` with the reserve, its bounds
    ``low_bytes`` and ``high_bytes``, whether they fit (``told_fitting``), and ``step_s``, ``tokens_per_s`` and perhaps
    ``tokens_per_dollar`` as ``simulate`` finds them. Peers: see ``peer_rows``.

    All states are simulated in fp32, so the peak of an option is that of ``plan``; that of a peer is simulated.

    Args:
        options: of ``plan``.
        gpu: name or file.
        link_gbps: network of each GPU.
        gpu_gib: memory of one GPU.
        reserve_gib: of that, for other things.
        price: dollars per GPU and hour.
        peers: whether they have rows.

    Raises:
        ValueError: see ``check_times``.
    """
    base = check_times(options[0].setup, gpu, link_gbps, price)
    (method,) = base.methods
    simulated = simulated_ways(simulate, base)
    rows: list[Found] = []
    for option in options:
        setup = option.setup
        name = method if setup.offload == "none" else f"{method}{OFFLOAD}"
        row = simulated(name, setup.density, setup.micro_batch_size, setup.activation_checkpointing)
        sizes = {"peak_bytes": option.gib, "low_bytes": option.low_gib, "high_bytes": option.high_gib}
        row = {**row, **{key: gib * GIB for key, gib in sizes.items()}}
        if all(row["name"] != other["name"] or _way(row) != _way(other) for other in rows):
            rows.append(row)
    if peers:
        rows += peer_rows(simulated, options[0].setup, gpu_gib, reserve_gib)
    return told_fitting(rows, gpu_gib)


def _way(row: Found) -> tuple[Any, ...]:
    return row["density"], row["micro_batch_size"], row["activation_checkpointing"]
