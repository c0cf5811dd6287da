"""Predicted times beside what ``memory plan`` lists, and what full fine-tuning and LoRA would take of the same GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trace_dist.benchmarks.contestants import OFFLOAD
from trace_dist.benchmarks.simulate import simulate
from trace_dist.profiling.memory_setup import MemorySetup
from trace_dist.profiling.plan import GIB, Option
from trace_dist.profiling.simulation.setup import SimulationSetup

PEERS = ("full", "LoRA")
GPUS_PER_NODE = 8
BLOCK = 64
"""Elements of the blocks that are simulated."""


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


def plan_times(options: Sequence[Option], gpu: str, link_gbps: float) -> list[dict[str, Any]]:
    """One row per option and peer: ``name``, ``step_s`` and ``tokens_per_s`` as ``simulate`` finds them, ``micro_batch_size``.

    All states are simulated in fp32, so the peak of an option is that of ``plan``; that of a peer is simulated. Peers get the
    largest micro-batch of the options, and no recomputation.

    Args:
        options: of ``plan``, under ZeRO-3, without 4-bit weights.
        gpu: name or file.
        link_gbps: network of each GPU.

    Raises:
        ValueError: no time is predicted for such masks, backends or weights, or the GPUs do not fill nodes.
    """
    base = options[0].setup
    method = method_of(base)
    if base.backend != "zero3" or base.quantize != "none":
        raise ValueError(
            f"gpu={gpu!r}: times are predicted for backend zero3 and unquantised weights; leave gpu out for others"
        )
    gpus = base.world_size
    if gpus > GPUS_PER_NODE and gpus % GPUS_PER_NODE:
        raise ValueError(
            f"gpus={gpus}: must fill nodes of {GPUS_PER_NODE} GPUs where there are more; use a multiple"
        )
    per_node = min(gpus, GPUS_PER_NODE)
    rows, seen = [], set()

    def row(name: str, density: float, micro_batch: int, recomputes: bool, peak: float | None = None) -> None:
        key = (name, density, micro_batch, recomputes)
        if key in seen:
            return
        seen.add(key)
        setup = SimulationSetup(
            *(base.model, gpus // per_node, per_node, gpu, link_gbps),
            methods=(name,),
            density=density,
            micro_batch_size=micro_batch,
            sequence_length=base.sequence_length,
            sequence_parallel=base.sequence_parallel,
            activation_checkpointing=recomputes,
        )
        found = simulate(setup)
        kept = {key: found["methods"][name][key] for key in ("peak_bytes", "step_s", "tokens_per_s")}
        kept["peak_bytes"] = kept["peak_bytes"] if peak is None else peak * GIB
        memory = found["gpu"]["memory_gib"] * GIB
        way = {"density": density, "micro_batch_size": micro_batch, "activation_checkpointing": recomputes}
        rows.append({"name": name, **way, **kept, "fits": kept["peak_bytes"] < memory})

    for option in options:
        way = option.setup
        name = method if way.offload == "none" else f"{method}{OFFLOAD}"
        row(name, way.density, way.micro_batch_size, way.activation_checkpointing, option.gib)
    largest = max(option.setup.micro_batch_size for option in options)
    for name in PEERS:
        row(name, base.density, largest, False)
    return rows
