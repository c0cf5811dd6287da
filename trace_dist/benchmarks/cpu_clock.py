"""What operators, collectives and our kernels take on the CPUs of this job's ranks, each by itself.

All ranks time the same at the same time, so that they share cores and memory as in a training step.
"""

from __future__ import annotations

import pickle
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td
from trace_kernels.bench import run_bench

from trace_dist.benchmarks.jobs import run_rank
from trace_dist.profiling.measure import keep_freed_blocks
from trace_dist.profiling.simulation.calls import Call, Shape
from trace_dist.sharding import gloo
from trace_dist.utils import dist
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)
SECONDS, MOST = 0.1, 50
"""For how long, and how often, each is called at most; the mean counts."""
ROUNDS = 10
"""How often a collective is called."""
KERNELS = ("compact", "masked_adamw")
"""Of ours, which say at how many bytes per second the others run."""


def mean_seconds(run: Callable[[], object]) -> float:
    """Seconds of a call, after one that does not count."""
    run()
    begin, number = time.perf_counter(), 0
    while number < MOST and time.perf_counter() - begin < SECONDS:
        run()
        number += 1
    return (time.perf_counter() - begin) / number


def operator_seconds(call: Call) -> float:
    """Of one operator."""
    args, kwargs = call.filled()
    function = call.function
    with torch.no_grad():
        return mean_seconds(lambda: function(*args, **kwargs))


def collective_seconds(call: Call) -> float:
    """Of one collective; of a message its share of an all-gather by messages (``sharding.gloo``). Collective.

    Raises:
        ValueError: it is not known.
    """
    shape: Shape = call.operands[0]
    world, whole = dist.world_size(), shape.filled().reshape(-1)
    if call.name in ("recv_", "barrier") or world == 1:
        return 0.0
    if call.name == "send":
        gathered = whole.new_empty(world * len(whole))
        return _on_all(lambda: gloo.all_gather(gathered, whole)) / (world - 1)
    part = whole[: len(whole) // world]
    even = whole[: world * len(part)]
    kinds: dict[str, Callable[[], object]] = {
        "allreduce_": lambda: td.all_reduce(whole),
        "broadcast_": lambda: td.broadcast(whole, 0),
        "_allgather_base_": lambda: td.all_gather_into_tensor(even, part.clone()),
        "allgather_": lambda: td.all_gather([torch.empty_like(whole) for _ in range(world)], whole),
        "_reduce_scatter_base_": lambda: td.reduce_scatter_tensor(part.clone(), even),
        "alltoall_base_": lambda: td.all_to_all_single(torch.empty_like(even), even),
    }
    if call.name not in kinds:
        raise ValueError(f"collective={call.name!r}: cannot be timed; add it to benchmarks/cpu_clock.py")
    return _on_all(kinds[call.name])


def _on_all(run: Callable[[], object]) -> float:
    """Seconds of something collective, called as often on every rank."""
    run()
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(ROUNDS):
        run()
    return (time.perf_counter() - begin) / ROUNDS


def all_seconds(calls: dict[str, Call]) -> dict[str, float]:
    """Seconds of each call; an operator that cannot be called by itself is left out. Collective."""
    found: dict[str, float] = {}
    for key, call in calls.items():
        if "." not in call.name:
            found[key] = collective_seconds(call)
            continue
        try:
            found[key] = operator_seconds(call)
        # Of hundreds of operators some may ask for values that mean something.
        except (RuntimeError, TypeError, IndexError, NotImplementedError) as error:
            # Some say nothing.
            why = next(iter(str(error).splitlines()), type(error).__name__)
            logger.warning("%s: not timed (%s)", call.name, why)
    return found


def kernel_rates(density: float, blocks: Sequence[int]) -> dict[str, float]:
    """Bytes per second, of those that they must move, at which our kernels run, by the elements of a block."""
    slowness: dict[int, list[float]] = {block: [] for block in blocks}
    for row in run_bench("cpu", KERNELS, densities=(density,)):
        if row.get("block") in slowness:
            slowness[row["block"]].append(1 / row["gb_per_s"])
    return {str(block): 1e9 / statistics.mean(each) for block, each in slowness.items()}


def measure(given: Path) -> dict[str, Any]:
    """Seconds of what is in a file. Collective."""
    keep_freed_blocks()
    asked: dict[str, Any] = pickle.loads(given.read_bytes())  # of the parent process
    return {
        "seconds": all_seconds(asked["calls"]),
        "rates": kernel_rates(asked["density"], asked["blocks"]),
    }


if __name__ == "__main__":
    run_rank(lambda asked: measure(Path(asked["calls"])))
