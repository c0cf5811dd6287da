"""Tables of ``trace-dist simulate``: memory, traffic and predicted time of each method on one cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from trace_dist.profiling.bounds import fits
from trace_dist.report.memory_tables import GIB, NOT_AT_HIGH

Found = Mapping[str, Any]


def overview_table(found: Found) -> Table:
    """One row per method: what fits, what travels, how long a step is predicted to take."""
    setup, memory = found["setup"], found["gpu"]["memory_gib"]
    heads = [
        "peak GiB",
        "fits",
        "GiB sent",
        "launches",
        "step ms, predicted",
        "low to high",
        "of full",
        "tokens/s",
    ]
    priced = setup["price"] is not None
    where = f"{setup['nodes']} x {setup['gpus_per_node']} {found['gpu']['name']}"
    table = _table("method", *heads, *(["M tokens/$"] if priced else []), title=f"one rank of {where}")
    table.caption = f"fits: with {setup['reserve_gib']:g} GiB left free (--reserve_gib)"
    for name, method in found["methods"].items():
        step = {bound: f"{1e3 * seconds:,.0f}" for bound, seconds in method["step_s"].items()}
        peak = method["peak_bytes"] / GIB
        cells = [
            f"{peak:.1f}",
            "yes" if fits(method["peak_bytes"], memory, setup["reserve_gib"]) else "no",
            f"{sum(method['sent_bytes'].values()) / GIB:.2f}",
            f"{sum(method['launches'].values()):,.0f}",
            step["expected"],
            f"{step['low']} - {step['high']}",
            f"{method['step_ratio']:.2f}x" if "step_ratio" in method else "",
            f"{method['tokens_per_s']['expected']:,.0f}",
        ]
        if priced:
            cells.append(f"{method['tokens_per_dollar']['expected'] / 1e6:.2f}")
        table.add_row(name, *cells)
    return table


def spent_table(found: Found) -> Table:
    """Where the predicted time goes: one row per kind of work or waiting, one column per method."""
    return _by_method(found, "spent_s", 1e3, "milliseconds of the step, predicted", "step_s")


def state_table(found: Found) -> Table:
    """What lies on the fullest rank between steps."""
    return _by_method(found, "kept_bytes", 1 / GIB, "GiB on each rank between steps", "states_bytes")


def _by_method(found: Found, key: str, factor: float, title: str, whole: str) -> Table:
    methods = found["methods"]
    table = _table("", *methods, title=title)
    rows = list(dict.fromkeys(row for method in methods.values() for row in method[key]))
    for row in rows:
        sizes = [factor * method[key].get(row, 0) for method in methods.values()]
        if max(sizes) > 0.005:
            table.add_row(row.replace("_", " "), *(f"{size:,.2f}" for size in sizes))
    together = (m[whole]["expected"] if isinstance(m[whole], Mapping) else m[whole] for m in methods.values())
    table.add_section()
    table.add_row("together", *(f"{factor * size:,.2f}" for size in together), style="bold")
    return table


def times_table(rows: Sequence[Mapping[str, Any]], gpu: str) -> Table:
    """Predicted steps of the options of ``memory plan``, and of its peers (``benchmarks.plan_times``)."""
    heads = ["density", "micro-batch", "recompute", "peak GiB", "fits", "step ms", "low to high", "tokens/s"]
    priced = any("tokens_per_dollar" in row for row in rows)
    if priced:
        heads.append("M tokens/$")
    table = _table("method", *heads, title=f"simulated on {gpu}; times are predictions")
    for row in rows:
        step = {bound: f"{1e3 * seconds:,.0f}" for bound, seconds in row["step_s"].items()}
        table.add_row(
            *(row["name"], f"{row['density']:g}", str(row["micro_batch_size"])),
            "yes" if row["activation_checkpointing"] else "-",
            f"{row['peak_bytes'] / GIB:.1f}",
            ("yes" if row["fits_at_high"] else "yes*") if row["fits"] else "no",
            *(step["expected"], f"{step['low']} - {step['high']}"),
            f"{row['tokens_per_s']['expected']:,.0f}",
            *([f"{row['tokens_per_dollar']['expected'] / 1e6:.2f}"] if priced else []),
        )
    if any(row["fits"] and not row["fits_at_high"] for row in rows):
        table.caption = NOT_AT_HIGH
    return table


def note(found: Found) -> str:
    """What was counted, and what is a prediction."""
    blocks = " and ".join(str(number) for number in found["simulated_blocks"])
    unfused = (
        "" if found["attention"] == "sdpa" else "The family has no fused attention: its own is simulated. "
    )
    return unfused + (
        f"Memory, launches and bytes are counted on one rank that computes nothing ({blocks} decoder blocks simulated); times "
        "are predictions by a stated model, which no GPU has run: docs/scale.md"
    )


def _table(*heads: str, title: str) -> Table:
    table = Table(*heads, title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    return table
