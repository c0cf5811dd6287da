"""``trace-dist bench``: every benchmark prints its result or writes it as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from trace_dist.utils.env import meta_info, run_info
from trace_dist.utils.files import check_writable, write_json


def bench_command(values: Any) -> None:
    """``kernels``, ``optimizer``, ``step``, ``serve``, ``memory``, ``simulate`` or ``checkpoint``, with the parsed arguments.

    Raises:
        ValueError: a value makes no sense.
    """
    name, arguments = values.action, values[values.action]
    out = None if arguments.out is None else Path(arguments.out)
    check_writable(out, "out")
    for argument in ("rounds", "steps", "ranks", "tokens"):
        if arguments.get(argument, 1) < 1:
            raise ValueError(f"{argument}={arguments[argument]}: must be at least 1; raise it")
    if arguments.get("density") is not None:
        from trace_dist.masks.select import check_density

        check_density(arguments.density)
    result = BENCHES[name](arguments, out)
    if out is None:
        json.dump(result, sys.stdout, indent=1)
    else:
        write_json(out, result)


def _kernels(arguments: Any, out: Path | None) -> dict[str, Any]:
    import torch
    from trace_kernels.bench import run_bench

    rows = run_bench("cuda" if torch.cuda.is_available() else "cpu")
    return {"run_info": run_info(), "meta_info": meta_info(), "rows": rows}


def _optimizer(arguments: Any, out: Path | None) -> dict[str, Any]:
    from trace_dist.benchmarks.optimizer import race_optimizers

    return race_optimizers(arguments.density, arguments.rounds)


def _step(arguments: Any, out: Path | None) -> dict[str, Any]:
    from trace_dist.benchmarks.contestants import CONTESTANTS, Race
    from trace_dist.benchmarks.step import race_in_turn

    race = Race(
        arguments.shape, arguments.density, arguments.micro_batch, arguments.sequence, arguments.attention
    )
    names = CONTESTANTS if arguments.contestants is None else arguments.contestants
    return race_in_turn(race, names, arguments.ranks, arguments.rounds, arguments.steps, out)


def _checkpoint(arguments: Any, out: Path | None) -> dict[str, Any]:
    from trace_dist.benchmarks.checkpoint import bench_checkpoint
    from trace_dist.benchmarks.contestants import Race

    race = Race(arguments.shape, arguments.density)
    return bench_checkpoint(race, arguments.ranks, arguments.rounds, arguments.steps)


def _memory(arguments: Any, out: Path | None) -> dict[str, Any]:
    from trace_dist.benchmarks.prediction import compare_memory

    return compare_memory(arguments.rounds)


def _simulate(arguments: Any, out: Path | None) -> dict[str, Any]:
    from trace_dist.benchmarks.agreement import compare
    from trace_dist.benchmarks.contestants import Race

    race = Race(arguments.shape, arguments.density, arguments.micro_batch, arguments.sequence)
    return compare(race, arguments.steps, arguments.rounds)


def _serve(arguments: Any, out: Path | None) -> dict[str, Any]:
    from trace_dist.benchmarks.contestants import Race
    from trace_dist.benchmarks.serve import bench_serving

    race = Race(arguments.shape, arguments.density, sequence=arguments.sequence)
    return bench_serving(race, arguments.tokens, arguments.rounds)


BENCHES = {
    "kernels": _kernels,
    "optimizer": _optimizer,
    "step": _step,
    "serve": _serve,
    "memory": _memory,
    "simulate": _simulate,
    "checkpoint": _checkpoint,
}
