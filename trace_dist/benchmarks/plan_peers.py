"""Full fine-tuning and LoRA beside what ``memory plan`` lists: what they need of the same GPUs.

Their program runs on a rank that computes nothing (``benchmarks.simulate``), which counts its memory; ``plan_times`` adds times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

from trace_dist.benchmarks.simulate import count
from trace_dist.profiling.bounds import SIMULATION_ERROR, bounds, waiting_bytes
from trace_dist.profiling.estimate import Estimator
from trace_dist.profiling.memory_setup import MemorySetup
from trace_dist.profiling.plan import GIB, MICRO_BATCHES, Option
from trace_dist.profiling.simulation.setup import MOST_RANKS, SimulationSetup
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)
PEERS = ("full", "LoRA")
SIMULATED = (
    ("backend", "zero3"),
    ("quantize", "none"),
    ("dtype", "bfloat16"),
    ("maskable", "linear"),
)
"""What is simulated of the values that a plan may have."""
KEPT = ("peak_bytes", "host_bytes", "num_trained", "step_s", "tokens_per_s", "tokens_per_dollar")
STATE_BYTES = 12
"""Of a trained parameter in a checkpoint: its value and both moments in fp32."""
Found = dict[str, Any]
Simulated = Callable[[str, float, int, bool], Found]
"""Name, density, micro-batch, whether activations are recomputed -> what is found of such training, ``peak_bytes`` among it."""


def check_simulated(setup: MemorySetup, purpose: str, cure: str = "") -> None:
    """Refuse values that are not simulated.

    Args:
        setup: what is planned.
        purpose: what they would be simulated for, such as ``times are predicted``.
        cure: what helps beside the known value, with ``or`` behind it.

    Raises:
        ValueError: there is one; begins with its name.
    """
    for name, known in SIMULATED:
        value = getattr(setup, name)
        if value != known:
            raise ValueError(
                f"{name}={value!r}: {purpose} for backend zero3, unquantised bfloat16 weights and maskable linear; "
                f"{cure}use {known}"
            )


def plan_peers(options: Sequence[Option], gpu_gib: float, reserve_gib: float = 0.0) -> list[Found]:
    """One row per way of training each peer; no kind of GPU is asked for, and no time predicted.

    Args:
        options: of ``plan``; the model, the ranks, the length and, for LoRA, the density are those of the first.
        gpu_gib: memory of one GPU.
        reserve_gib: of that, for other things.

    Returns:
        See ``peer_rows`` and ``told_fitting``.

    Raises:
        ValueError: such a backend, such weights, such masks or so many GPUs are not simulated, or the family's code does not run.
    """
    setup = options[0].setup
    check_simulated(setup, "they are simulated")
    if setup.world_size > MOST_RANKS:
        raise ValueError(
            f"gpus={setup.world_size}: they are simulated on at most {MOST_RANKS} ranks; use fewer"
        )
    logger.info("full fine-tuning and LoRA are simulated, which takes minutes for a large model")
    base = SimulationSetup(
        *(setup.model, setup.world_size, 1),
        sequence_length=setup.sequence_length,
        sequence_parallel=setup.sequence_parallel,
    )
    return told_fitting(peer_rows(simulated_ways(count, base), setup, gpu_gib, reserve_gib), gpu_gib)


def simulated_ways(find: Callable[[SimulationSetup], Found], base: SimulationSetup) -> Simulated:
    """What is found of methods and ways of training them; each is simulated once.

    Args:
        find: ``count`` or ``simulate``.
        base: all but method, density, micro-batch and recomputation.
    """

    @cache
    def simulated(name: str, density: float, micro_batch: int, recomputes: bool) -> Found:
        way: Found = {
            "density": density,
            "micro_batch_size": micro_batch,
            "activation_checkpointing": recomputes,
        }
        found = find(replace(base, methods=(name,), **way))["methods"][name]
        return {"name": name, **way, **{key: found[key] for key in KEPT if key in found}}

    return simulated


def peer_rows(
    simulated: Simulated, setup: MemorySetup, gpu_gib: float, reserve_gib: float
) -> Iterator[Found]:
    """One row per way of training each peer: what ``simulated`` finds of it; ``peak_bytes``, the reserve included, and its bounds
    ``low_bytes`` and ``high_bytes`` (profiling/bounds.py); and ``checkpoint_bytes``, of all ranks: values and moments of what is
    trained in fp32, without copies of frozen weights. What loading takes of the host is each program's own, and not known.

    A peer gets the largest micro-batch that fits, and with recomputed activations another one where that lets a larger one fit.
    One that fits in no way has its leanest.

    Args:
        simulated: what is found of one way of training.
        setup: model, ranks and the density of which LoRA trains as many parameters.
        gpu_gib: memory of one GPU.
        reserve_gib: of that, for other things.
    """
    estimator = Estimator(setup.model, setup.dtype)
    recomputing = (False, True) if estimator.module.supports_gradient_checkpointing else (False,)
    waiting = waiting_bytes(estimator.block_bytes, setup.backend, setup.world_size)
    reserve = reserve_gib * GIB
    for name in PEERS:
        for row in _of_peer(partial(simulated, name, setup.density), recomputing, gpu_gib * GIB - reserve):
            low, expected, high = bounds(row["peak_bytes"], reserve, SIMULATION_ERROR, waiting)
            sizes = {"peak_bytes": expected, "low_bytes": low, "high_bytes": high}
            yield {**row, **sizes, "checkpoint_bytes": STATE_BYTES * row["num_trained"]}


def told_fitting(rows: Iterator[Found] | Sequence[Found], gpu_gib: float) -> list[Found]:
    """The rows with ``fits``, which the expected peak tells, and ``fits_at_high``."""
    room = gpu_gib * GIB
    return [
        {**row, "fits": row["peak_bytes"] <= room, "fits_at_high": row["high_bytes"] <= room} for row in rows
    ]


def _of_peer(
    simulated: Callable[[int, bool], Found], recomputing: Sequence[bool], room: float
) -> Iterator[Found]:
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
