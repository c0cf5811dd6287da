"""``trace-dist memory``: predict it, measure it, plan with it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trace_dist.cli.arguments import NOT_ASKED
from trace_dist.cli.parser import run_config
from trace_dist.profiling.memory_setup import MemorySetup
from trace_dist.utils import dist
from trace_dist.utils.files import check_writable, write_json


def memory_command(values: Any) -> None:
    """``estimate``, ``profile``, ``plan`` or ``measure``, with the parsed arguments.

    Raises:
        ValueError: a value makes no sense, or the model has no readable config.
    """
    action, arguments = values.action, values[values.action]
    if action == "measure":
        from trace_dist.stages.memory import run_memory
        from trace_dist.stages.start import start

        cfg = run_config(arguments)
        start(cfg, "memory measure")
        run_memory(cfg)
        return
    for name in ("out", "plot"):
        check_writable(arguments.get(name), name)
    names = MemorySetup.__dataclass_fields__.keys() - NOT_ASKED[action]
    setup = MemorySetup(**{name: arguments[name] for name in names})
    {"estimate": _estimate, "profile": _profile, "plan": _plan}[action](setup, arguments)


def _estimate(setup: MemorySetup, arguments: Any) -> None:
    from trace_dist.profiling.estimate import estimate
    from trace_dist.report.memory_tables import estimate_table, mib, print_table

    found = estimate(setup)
    print_table(estimate_table(found, asdict(setup)))
    print(f"peak: {found.peak_where}")
    parts = ", ".join(f"{name.replace('_', ' ')} {mib(size)}" for name, size in found.host.items() if size)
    if parts:
        print(f"in host memory: {mib(sum(found.host.values()))} ({parts})")
    if arguments.out is not None:
        write_json(Path(arguments.out), {"setup": asdict(setup), "estimate": found.as_dict()})


def _profile(setup: MemorySetup, arguments: Any) -> None:
    from trace_dist.profiling.profile import run_profile
    from trace_dist.report.memory_tables import comparison_table, print_table
    from trace_dist.utils.env import meta_info, run_info

    result = run_profile(setup, arguments.steps)
    if not dist.is_main():
        return
    print_table(comparison_table(result))
    if arguments.out is not None:
        write_json(Path(arguments.out), {"run_info": run_info(), "meta_info": meta_info(), **result})
    if arguments.plot is not None:
        from trace_dist.report.memory_plot import draw_timeline

        print(f"plot: {draw_timeline(result, Path(arguments.plot))}")


def _plan(setup: MemorySetup, arguments: Any) -> None:
    from trace_dist.profiling.plan import plan
    from trace_dist.report.memory_tables import plan_table, print_table

    if arguments.gpus < 1:
        raise ValueError(f"gpus={arguments.gpus}: must be at least 1; raise it")
    if arguments.gpu is None and arguments.price is not None:
        raise ValueError(
            f"price={arguments.price:g}: is of predicted steps, and none are asked for; give gpu too"
        )
    setup = replace(setup, world_size=arguments.gpus)
    if arguments.gpu is not None:
        from trace_dist.benchmarks.plan_times import check_times

        check_times(setup, arguments.gpu, arguments.link_gbps, arguments.price)
    options = plan(setup, arguments.gpu_gib, arguments.reserve_gib)
    print_table(plan_table(options, arguments.gpus, arguments.gpu_gib))
    result: dict[str, Any] = {"options": [asdict(option) for option in options]}
    if arguments.out is not None:
        write_json(Path(arguments.out), result)
    if arguments.gpu is not None:
        _times(options, arguments, result)
    elif arguments.peers:
        _peers(options, arguments, result)


def _peers(options: Any, arguments: Any, result: dict[str, Any]) -> None:
    """Full fine-tuning and LoRA; where they cannot be simulated, one line says why."""
    from trace_dist.benchmarks.plan_peers import plan_peers
    from trace_dist.report.memory_tables import peers_table, print_table

    try:
        result["peers"] = plan_peers(options, arguments.gpu_gib, arguments.reserve_gib)
    except ValueError as error:
        print(f"full fine-tuning and LoRA are left out: {error}")
        return
    print_table(peers_table(result["peers"], arguments.gpus, arguments.gpu_gib))
    if arguments.out is not None:
        write_json(Path(arguments.out), result)


def _times(options: Any, arguments: Any, result: dict[str, Any]) -> None:
    from trace_dist.benchmarks.plan_times import plan_times
    from trace_dist.report.memory_tables import print_table
    from trace_dist.report.simulation_tables import times_table

    names = ("gpu", "link_gbps", "gpu_gib", "reserve_gib", "price", "peers")
    result["times"] = plan_times(options, *(arguments[name] for name in names))
    print_table(times_table(result["times"], arguments.gpu))
    if arguments.out is not None:
        write_json(Path(arguments.out), result)
