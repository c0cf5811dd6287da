"""docs/scale.md: its tables are made from the study's results, and a test compares them.

python -m trace_dist.benchmarks.scale_page docs/results docs/scale.md
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trace_dist.benchmarks.agreement import LIMITS
from trace_dist.benchmarks.document import Sections, grid, render, with_origin
from trace_dist.benchmarks.scale import MEASURED, ON_A_NODE, RANKS
from trace_dist.profiling.bounds import fits
from trace_dist.profiling.simulation.gpus import load_gpu, sources
from trace_dist.profiling.simulation.setup import METHODS
from trace_dist.utils.files import write_text

GIB = 2**30
MISSING = "Not run yet."
"""In the place of a table whose parts a study lacks that was cut."""
Found = Mapping[str, Any]


def measured_table(parts: Found, *results: Found) -> str:
    """Simulated beside measured, of one H100."""
    rows = []
    for name, result in zip(MEASURED, results, strict=True):
        for row in result["rows"]:
            if row["name"] not in parts.get(name, {}):
                continue
            found = parts[name][row["name"]]
            peaks, steps = (found["peak_bytes"], row["peak_device_bytes"]), found["step_s"]
            rows.append(
                [
                    f"{result['settings']['shape']}, {row['name']}",
                    *(f"{peak / GIB:.2f}" for peak in peaks),
                    f"{peaks[0] / peaks[1] - 1:+.1%}",
                    *(f"{1e3 * seconds:,.0f}" for seconds in (steps["expected"], row["step_s"])),
                    f"{steps['expected'] / row['step_s'] - 1:+.0%}",
                ]
            )
    head = ["peak, simulated, GiB", "measured", "error", "step, modelled, ms", "measured", "error"]
    return grid(["one H100", *head], rows)


def agreement_table(result: Found) -> str:
    """Simulated beside measured on CPUs; what misses the limits is marked."""
    rows = []
    for row in result["rows"]:
        simulated, measured = row["simulated"], row["measured"]
        same = simulated["sent_bytes"] == measured["sent_bytes"]
        peaks, steps = (
            [f"{scale * each[key]:.{digits}f}" for each in (simulated, measured)]
            for key, scale, digits in (("peak_bytes", 1 / 2**20, 0), ("step_s", 1e3, 0))
        )
        errors = {
            key: f"{error:+.1%}" + ("" if abs(error) <= LIMITS[key] else ", missed")
            for key, error in row["errors"].items()
        }
        rows.append(
            [
                f"{row['name']}, {row['ranks']} rank{'s' * (row['ranks'] > 1)}",
                f"{measured['sent_bytes'] / 2**20:,.1f}",
                "equal" if same else f"{simulated['sent_bytes'] / 2**20:,.1f}",
                *(*peaks, errors["peak"], *steps, errors["time"]),
            ]
        )
    head = ["sent, MiB", "simulated", "peak, simulated, MiB", "measured", "error"]
    head += ["step, predicted, ms", "measured", "error"]
    return with_origin(result, grid(["", *head], rows))


def node_table(parts: Found, gpu: str = "h100") -> str:
    """Methods on eight GPUs of a kind."""
    node = _node(parts, gpu)
    full = node["full"]["step_s"]
    rows = []
    for name, found in node.items():
        step = found["step_s"]
        bounds = [f"{1e3 * step[bound]:,.0f}" for bound in ("low", "expected", "high")]
        ratios = [f"{step[bound] / full[bound]:.2f}x" for bound in ("expected", "low", "high")]
        rows.append(
            [
                *(name, ratios[0], f"{ratios[1]}, {ratios[2]}", bounds[1], f"{bounds[0]} to {bounds[2]}"),
                f"{found['tokens_per_s']['expected']:,.0f}",
                f"{found['peak_bytes'] / GIB:.1f}",
                *(f"{size / GIB:.2f}" for size in _sent(found)),
                f"{sum(found['launches'].values()):,.0f}",
            ]
        )
    head = ["step / full", "at low, high", "step, ms", "low to high", "tokens/s", "peak, GiB"]
    return grid(["", *head, "weights sent, GiB", "gradients sent, GiB", "launches"], rows)


def _node(parts: Found, gpu: str) -> dict[str, Found]:
    """Method -> what was found on eight GPUs of a kind; a study that was cut lacks some."""
    return {name: parts[f"node, {name}"][gpu] for name in ON_A_NODE if f"node, {name}" in parts}


def _sent(found: Found) -> tuple[float, float]:
    """Bytes of weights, and of everything else, that a rank sends in a step."""
    weights = sum(size for name, size in found["sent_bytes"].items() if "gather" in name)
    return weights, sum(found["sent_bytes"].values()) - weights


def spent_table(parts: Found, gpu: str = "h100") -> str:
    """Where the time of a step goes, in milliseconds."""
    node = {name: found["spent_s"] for name, found in _node(parts, gpu).items()}
    kinds = list(dict.fromkeys(kind for spent in node.values() for kind in spent))
    kinds = [kind for kind in kinds if any(spent.get(kind, 0) > 5e-4 for spent in node.values())]
    rows = [
        [name, *(f"{max(0.0, 1e3 * spent.get(kind, 0)):.0f}" for kind in kinds)]
        for name, spent in node.items()
    ]
    named = {"pick": "picking and exchange", "other": "other kernels"}
    return grid(["ms", *(named.get(kind, kind) for kind in kinds)], rows)


def gpu_table(parts: Found) -> str:
    """Predicted steps of eight GPUs of each kind, and whether a method fits."""
    rows = []
    for gpu in parts["node, full"]:
        spec = load_gpu(gpu)
        cells, node = [], _node(parts, gpu)
        for found in node.values():
            room = fits(found["peak_bytes"], spec.memory_gib)
            cells.append(f"{1e3 * found['step_s']['expected']:,.0f}" if room else "does not fit")
        rows.append([spec.name, *cells])
    return grid(["step, ms", *_node(parts, "h100")], rows)


def ranks_table(parts: Found) -> str:
    """How a step and a rank's memory change with the number of ranks."""
    rows = []
    node = _node(parts, "h100")
    for ranks in (8, *RANKS):
        for name in METHODS:
            found = parts.get(f"{ranks} ranks, {name}") if ranks > 8 else node.get(name)
            if found is None:
                continue
            step = found["step_s"]
            rows.append(
                [
                    f"{ranks:,} ranks, {name}",
                    f"{1e3 * step['expected']:,.0f}",
                    f"{1e3 * step['low']:,.0f} to {1e3 * step['high']:,.0f}",
                    f"{found['tokens_per_s']['expected'] / ranks:,.0f}",
                    f"{found['peak_bytes'] / GIB:.1f}",
                    f"{found['states_bytes'] / GIB:.2f}",
                    f"{found['link_bytes']['network'] / GIB:.2f}",
                ]
            )
    head = ["step, ms", "low to high", "tokens/s per GPU", "peak, GiB", "between steps, GiB"]
    return grid(["", *head, "sent to other nodes, GiB"], rows)


def states_table(parts: Found) -> str:
    """What an element mask keeps on each rank between steps, by number of ranks: MiB."""
    if "1024 ranks, element" not in parts or "node, element" not in parts:
        return MISSING
    few, many = parts["node, element"]["h100"], parts["1024 ranks, element"]
    rows = []
    for kind, size in few["kept_bytes"].items():
        other = many["kept_bytes"].get(kind, 0)
        if size > GIB / 1e4:
            rows.append([kind.replace("_", " "), *(f"{each / 2**20:,.1f}" for each in (size, other))])
    return grid(["MiB on each rank", "8 ranks", "1,024 ranks"], rows)


def large_table(parts: Found) -> str:
    """Plans of a 70B model on eight GPUs of 24 GB."""
    rows = []
    for kind in ("row", "block"):
        if f"70B, {kind}" not in parts:
            continue
        found = parts[f"70B, {kind}"]
        way = found["plan"]
        rows.append(
            [
                f"{kind}, {way['density']:.0%}",
                *("NF4" if way["quantize"] == "nf4" else "bf16",),
                *(way["state_dtype"], "fp32" if way["master"] else "none", way["offload"]),
                "yes" if way["activation_checkpointing"] else "no",
                *(str(way["micro_batch_size"]), f"{found['gib']:.1f}", f"{found['host_gib']:.1f}"),
            ]
        )
    if not rows:
        return MISSING
    head = [
        "weights",
        "moments",
        "master",
        "offload",
        "recomputes",
        "micro-batch",
        "GiB per GPU",
        "host GiB per rank",
    ]
    return grid(["", *head], rows)


def attach_table(parts: Found) -> str:
    """Seconds of one rank of 1,024."""
    rows = []
    for kind in ("row", "block"):
        if f"attach, {kind}" not in parts:
            continue
        found = parts[f"attach, {kind}"]
        seconds = [f"{found[name]:.1f}" for name in ("draw_s", "attach_s", "resume_s")]
        rows.append([f"{kind}, 5 %", f"{found['entries'] / 1e9:.2f}e9", *seconds])
    if not rows:
        return MISSING
    return grid(["70B", "entries", "drawing the mask, s", "attach, s", "resume, s"], rows)


def constants_table() -> str:
    """The numbers of the model for an H100, and where they come from."""
    rows = [[f"`{key}`", f"{value:g}", source] for key, (value, source) in sources("h100").items()]
    lines = ["| constant | value | source |", "|---|---:|---|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _dated(table: Callable[..., str]) -> Callable[..., str]:
    """A table of the study's parts, and of other results, with the study's date."""
    return lambda result, *others: with_origin(result, table(result["parts"], *others))


SCALE = "scale.json"
SECTIONS: Sections = {
    "scale_measured": ((SCALE, *(f"{name}.json" for name in MEASURED)), _dated(measured_table)),
    "scale_agreement": (("bench_simulate.json",), agreement_table),
    "scale_node": ((SCALE,), _dated(node_table)),
    "scale_spent": ((SCALE,), _dated(spent_table)),
    "scale_gpus": ((SCALE,), _dated(gpu_table)),
    "scale_ranks": ((SCALE,), _dated(ranks_table)),
    "scale_states": ((SCALE,), _dated(states_table)),
    "scale_large": ((SCALE,), _dated(large_table)),
    "scale_attach": ((SCALE,), _dated(attach_table)),
    "scale_constants": ((), constants_table),
}
"""As of ``document.SECTIONS``."""

if __name__ == "__main__":
    page = Path(sys.argv[2])
    write_text(page, render(page.read_text(encoding="utf-8"), Path(sys.argv[1]), SECTIONS))
