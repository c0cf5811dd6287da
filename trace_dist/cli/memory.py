"""``trace-dist memory``: predict it, measure it, plan with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trace_dist.cli.parser import MEMORY_ARGUMENTS
from trace_dist.profiling.memory_setup import MemorySetup
from trace_dist.utils import dist
from trace_dist.utils.files import write_json

MIB = 2**20


def run_action(action: str, arguments: Any) -> None:
    """``estimate``, ``profile`` or ``plan``, with the parsed arguments.

    Raises:
        ValueError: a value makes no sense, or the model has no readable config.
    """
    names = MemorySetup.__dataclass_fields__.keys() - MEMORY_ARGUMENTS[action].skipped
    setup = MemorySetup(**{name: arguments[name] for name in names})
    {"estimate": _estimate, "profile": _profile, "plan": _plan}[action](setup, arguments)


def _estimate(setup: MemorySetup, arguments: Any) -> None:
    from trace_dist.profiling.estimate import estimate

    found = estimate(setup)
    table = Table(
        "on each rank",
        "between steps",
        "most in a step",
        "at the peak",
        title=_title(found.num_parameters, setup),
    )
    _justify(table)
    for name, at_peak in found.peak_parts.items():
        between, most = found.states.get(name), found.transient.get(name)
        if between or most or found.host.get(name):
            table.add_row(name.replace("_", " "), _mib(between), _mib(most), _mib(at_peak))
    table.add_section()
    table.add_row("together", _mib(sum(found.states.values())), "", _mib(found.peak), style="bold")
    print_table(table)
    print(f"peak: {found.peak_where}")
    if any(found.host.values()):
        print(f"in host memory: {_mib(sum(found.host.values()))}")
    if arguments.out is not None:
        write_json(Path(arguments.out), {"setup": asdict(setup), "estimate": found.as_dict()})


def _profile(setup: MemorySetup, arguments: Any) -> None:
    from trace_dist.profiling.profile import run_profile
    from trace_dist.utils.env import meta_info, run_info

    result = run_profile(setup, arguments.steps)
    if not dist.is_main():
        return
    print_table(comparison(result))
    if arguments.out is not None:
        write_json(Path(arguments.out), {"run_info": run_info(), "meta_info": meta_info(), **result})
    if arguments.plot is not None:
        from trace_dist.report.memory_plot import draw_timeline

        print(f"plot: {draw_timeline(result, Path(arguments.plot))}")


def comparison(result: Mapping[str, Any]) -> Table:
    """Estimate and measurement of ``run_profile`` side by side."""
    setup, estimate, measured = result["setup"], result["estimate"], result["measured"]
    title = _title(estimate["num_parameters"], MemorySetup(**setup))
    table = Table("on each rank", "estimated", "measured", "error", title=title)
    _justify(table)
    for name, size in measured["states"].items():
        predicted = estimate["states"][name]
        if size or predicted:
            table.add_row(name.replace("_", " "), _mib(predicted), _mib(size), _percent(predicted, size))
    table.add_section()
    together = sum(estimate["states"].values())
    table.add_row(
        "states", _mib(together), _mib(max(measured["rank_states"])), f"{result['errors']['states']:+.1%}"
    )
    for name, size in measured["between"].items():
        predicted = estimate["between"][name]
        table.add_row(f"{name} after forward", _mib(predicted), _mib(size), _percent(predicted, size))
    table.add_row(
        "peak",
        _mib(estimate["peak"]),
        _mib(measured["peak"]),
        f"{result['errors']['peak']:+.1%}",
        style="bold",
    )
    return table


def _plan(setup: MemorySetup, arguments: Any) -> None:
    from trace_dist.profiling.plan import plan

    options = plan(replace(setup, world_size=arguments.gpus), arguments.gpu_gib, arguments.reserve_gib)
    columns = (
        "density",
        "moments",
        "master",
        "offload",
        "recompute",
        "micro-batch",
        "GiB per GPU",
        "headroom",
        "host GiB",
    )
    gpus = "one GPU" if arguments.gpus == 1 else f"{arguments.gpus} GPUs"
    table = Table(*columns, title=f"{gpus} of {arguments.gpu_gib:g} GiB: what fits, most faithful first")
    _justify(table)
    for option in options:
        way = option.setup
        table.add_row(
            f"{way.density:g}",
            way.state_dtype,
            "fp32" if way.master else "-",
            way.offload.replace("none", "-"),
            "yes" if way.activation_checkpointing else "-",
            str(way.micro_batch_size),
            f"{option.gib:.1f}",
            f"{option.headroom_gib:.1f}",
            f"{option.host_gib:.1f}" if option.host_gib else "-",
        )
    print_table(table)
    if arguments.out is not None:
        write_json(Path(arguments.out), {"options": [asdict(option) for option in options]})


def _title(num_parameters: int, setup: MemorySetup) -> str:
    ranks = f"{setup.world_size} rank" + "s" * (setup.world_size > 1)
    return f"{num_parameters / 1e6:,.0f} M parameters, density {setup.density:g}, {setup.backend} on {ranks}"


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / MIB:,.1f} MiB"


def _percent(predicted: int, size: int) -> str:
    return f"{predicted / size - 1:+.1%}" if size else ""


def _justify(table: Table) -> None:
    for column in table.columns[1:]:
        column.justify = "right"


def print_table(table: Table) -> None:
    """Print a table, not narrower than its columns need where the output is no terminal."""
    Console(width=max(110, Console().width)).print(table)
