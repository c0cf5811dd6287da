"""Tables of ``trace-dist memory``: predicted, measured, and what fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from rich.table import Table

from trace_dist.utils import tables

MIB, GIB = 2**20, 2**30
NOT_AT_HIGH = "* fits at the expected peak, but not at the high bound"


def estimate_table(found: Any, setup: Mapping[str, Any]) -> Table:
    """An estimate (``profiling.estimate.Estimate``) by category."""
    heads = ("on each rank", "between steps", "most in a step", "at the peak")
    table = _table(*heads, title=_title(found.num_parameters, setup))
    for name, at_peak in found.peak_parts.items():
        between, most = found.states.get(name), found.transient.get(name)
        if between or most or found.host.get(name):
            table.add_row(name.replace("_", " "), mib(between), mib(most), mib(at_peak))
    table.add_section()
    table.add_row("together", mib(sum(found.states.values())), "", mib(found.peak), style="bold")
    return table


def comparison_table(result: Mapping[str, Any]) -> Table:
    """Estimate and measurement of ``profiling.profile.run_profile`` side by side."""
    estimate, measured, errors = result["estimate"], result["measured"], result["errors"]
    title = _title(estimate["num_parameters"], result["setup"])
    table = _table("on each rank", "estimated", "measured", "error", title=title)
    for name, size in measured["states"].items():
        predicted = estimate["states"][name] + estimate["host"][name]
        if size or predicted:
            table.add_row(name.replace("_", " "), mib(predicted), mib(size), _percent(predicted, size))
    table.add_section()
    together = sum((*estimate["states"].values(), *estimate["host"].values()))
    states = max(measured["rank_states"])
    table.add_row("states", mib(together), mib(states), f"{errors['states']:+.1%}")
    for name, size in measured["between"].items():
        predicted = estimate["between"][name]
        table.add_row(f"{name} after forward", mib(predicted), mib(size), _percent(predicted, size))
    peaks = (mib(estimate["peak"]), mib(measured["peak"]), f"{errors['peak']:+.1%}")
    table.add_row("peak", *peaks, style="bold")
    return table


def plan_table(options: Sequence[Any], gpus: int, gpu_gib: float) -> Table:
    """The ways of training that fit (``profiling.plan.Option``); those that may not, by their high bound, are marked."""
    ways = ("density", "moments", "master", "off-\nload", "recom-\npute", "micro-\nbatch")
    sizes = ("GiB per\nGPU", "low to\nhigh", "head-\nroom", "host\nGiB", "load-\ning\nGiB")
    disk = ("check-\npoint\nGiB", "delta\nGiB")
    title = f"{_gpus(gpus)} of {gpu_gib:g} GiB: what fits, most faithful first"
    table = _table(*ways, *sizes, *disk, title=title)
    table.collapse_padding = True
    for option in options:
        way = option.setup
        table.add_row(
            f"{way.density:g}",
            way.state_dtype.replace("float32", "fp32").replace("bfloat16", "bf16"),
            "fp32" if way.master else "-",
            way.offload.replace("none", "-"),
            "yes" if way.activation_checkpointing else "-",
            str(way.micro_batch_size),
            f"{option.gib:.1f}",
            _span(option.low_gib, option.high_gib, gpu_gib),
            f"{option.headroom_gib:.1f}",
            f"{option.host_gib:.1f}" if option.host_gib else "-",
            f"{option.loading_gib:.2f}",
            f"{option.checkpoint_gib:.2f}",
            f"{option.delta_gib:.2f}",
        )
    if any(option.high_gib > gpu_gib for option in options):
        table.caption = NOT_AT_HIGH
    return table


def peers_table(rows: Sequence[Mapping[str, Any]], gpus: int, gpu_gib: float) -> Table:
    """Memory of full fine-tuning and LoRA on the GPUs of a plan (``benchmarks.plan_peers``)."""
    heads = ("method", "M trained", "recompute", "micro-batch", "GiB per GPU", "low to high", "fits")
    density = f"LoRA of as many parameters as density {rows[0]['density']:g}"
    title = f"{_gpus(gpus)} of {gpu_gib:g} GiB: full fine-tuning and LoRA, simulated; {density}"
    table = _table(*heads, "host GiB", "checkpoint GiB", title=title)
    for row in rows:
        low, peak, high = (row[f"{bound}_bytes"] / GIB for bound in ("low", "peak", "high"))
        table.add_row(
            row["name"],
            f"{row['num_trained'] / 1e6:,.1f}",
            "yes" if row["activation_checkpointing"] else "-",
            str(row["micro_batch_size"]),
            f"{peak:.1f}",
            _span(low, high, gpu_gib if row["fits"] else inf),
            "yes" if row["fits"] else "no",
            f"{row['host_bytes'] / GIB:.1f}" if row["host_bytes"] else "-",
            f"{row['checkpoint_bytes'] / GIB:.2f}",
        )
    if any(row["fits"] and not row["fits_at_high"] for row in rows):
        table.caption = NOT_AT_HIGH
    return table


def print_table(table: Table) -> None:
    """Print a table, not narrower than its columns need where the output is no terminal."""
    tables.print_table(table, least_width=110)


def mib(size: int | None) -> str:
    """Bytes as MiB; nothing for None."""
    return "" if size is None else f"{size / MIB:,.1f} MiB"


def _table(*heads: str, title: str) -> Table:
    table = Table(*heads, title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _gpus(number: int) -> str:
    return "one GPU" if number == 1 else f"{number} GPUs"


def _span(low: float, high: float, room: float) -> str:
    return f"{low:.1f} - {high:.1f}" + "*" * (high > room)


def _title(num_parameters: int, setup: Mapping[str, Any]) -> str:
    ranks = f"{setup['world_size']} rank" + "s" * (setup["world_size"] > 1)
    millions, density = f"{num_parameters / 1e6:,.0f} M parameters", f"density {setup['density']:g}"
    return f"{millions}, {density}, {setup['backend']} on {ranks}"


def _percent(predicted: int, size: int) -> str:
    return f"{predicted / size - 1:+.1%}" if size else ""
