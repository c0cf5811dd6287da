"""docs/benchmarks.md: its tables are made from the results beside it, and a test compares them.

python -m trace_dist.benchmarks.document docs/results docs/benchmarks.md
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_dist.report.markdown import insert
from trace_dist.utils.files import read_json, write_text

Result = Mapping[str, Any]


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: text to the left, numbers to the right."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def with_origin(result: Result, table: str) -> str:
    """A table, and below it when and on what it was measured."""
    run, meta = result["run_info"], result["meta_info"]
    return f"{table}\n\n{run['date'][:10]}, commit {run['commit']}, {meta['hardware']}.\n"


def optimizer_table(result: Result) -> str:
    """Speed-up over the faster peer first."""
    rows = [
        [row["name"], row["weights"], f"{row['speedup']:.1f}x", f"{row['step_ms']:.1f}"]
        for row in result["rows"]
    ]
    return with_origin(result, grid(["optimizer step", "weights", "speed-up", "ms"], rows))


def step_table(result: Result) -> str:
    """Ratios to full fine-tuning first."""
    head = [
        "",
        "step / full",
        "step / LoRA",
        "gradient bytes / full",
        "step, s",
        "forward",
        "backward",
        "optimizer",
    ]
    rows = []
    steps = {row["name"]: row.get("step_s") for row in result["rows"]}
    for row in result["rows"]:
        if "error" in row:
            rows.append([row["name"], "does not run", *["–"] * 8])  # noqa: RUF001
            continue
        ratios = [f"{row['step_ratio']:.2f}x", f"{row['step_s'] / steps['LoRA']:.2f}x"]
        sent = [f"{row['gradient_bytes_ratio']:.3f}x", f"{row['step_s']:.2f}"]
        phases = [f"{seconds:.2f}" for seconds in row["phases_s"].values()]
        memory = [f"{row['gradient_bytes_sent'] / 1e6:.1f}", f"{row['peak_rss_bytes'] / 2**30:.2f}"]
        rows.append([row["name"], *ratios, *sent, *phases, *memory])
    return with_origin(result, grid([*head, "gradients sent, MB", "peak RSS, GiB"], rows))


def batch_table(*results: Result) -> str:
    """How the ratios depend on the tokens of a step: the fewer, the more a step's fixed costs weigh."""
    rows = []
    for result in results:
        settings = result["settings"]
        steps = {row["name"]: row["step_s"] for row in result["rows"] if "error" not in row}
        ratios = [
            f"{steps[name] / steps[peer]:.2f}x" for name in ("row", "element") for peer in ("full", "LoRA")
        ]
        seconds = [f"{steps[name]:.2f}" for name in ("row", "element", "full", "LoRA")]
        rows.append([f"{settings['micro_batch']} × {settings['sequence']}", *ratios, *seconds])  # noqa: RUF001
    ratios = ["row / full", "row / LoRA", "element / full", "element / LoRA"]
    head = ["tokens per rank and step", *ratios, "row, s", "element, s", "full, s", "LoRA, s"]
    return with_origin(results[0], grid(head, rows))


def memory_table(result: Result) -> str:
    """Relative error first."""
    rows = []
    for row in result["rows"]:
        setup, peak = row["setup"], row["measured"]["peak"]
        cells = [f"{row['errors']['peak']:+.1%}", f"{row['errors']['states']:+.2%}"]
        sizes = [f"{size / 2**20:,.0f}" for size in (row["estimate"]["peak"], peak)]
        rows.append([f"{row['name']}, {setup['world_size']} rank(s)", *cells, *sizes])
    return with_origin(
        result,
        grid(["estimate / measured − 1", "peak", "model states", "estimate, MiB", "measured, MiB"], rows),  # noqa: RUF001
    )


def time_table(result: Result) -> str:
    """Where the time of one step goes, in seconds of the profiled step."""
    rows = [row for row in result["rows"] if "error" not in row]
    kinds = list(rows[0]["time_s"])
    cells = [[row["name"], *(f"{row['time_s'][kind]:.2f}" for kind in kinds)] for row in rows]
    return with_origin(result, grid(["seconds", *kinds], cells))


def gpu_step_table(*results: Result) -> str:
    """Ratios to full fine-tuning and LoRA first; peak memory is the device's."""
    head = ["step / full", "step / LoRA", "memory / full", "step, ms", "forward", "backward", "optimizer"]
    rows = []
    for result in results:
        shape = result["settings"]["shape"]
        measured = {row["name"]: row for row in result["rows"] if "error" not in row}
        for row in result["rows"]:
            name = f"{shape}, {row['name']}"
            if "error" in row:
                why = "out of memory" if "OutOfMemory" in row["error"] else "did not run"
                rows.append([name, why, *["–"] * 7])  # noqa: RUF001
                continue
            ratios = [_ratio(row, measured.get(peer), "step_s") for peer in ("full", "LoRA")]
            ratios.append(_ratio(row, measured.get("full"), "peak_device_bytes"))
            times = [f"{1e3 * seconds:.0f}" for seconds in (row["step_s"], *row["phases_s"].values())]
            rows.append([name, *ratios, *times, f"{row['peak_device_bytes'] / 2**30:.1f}"])
    return with_origin(results[0], grid(["", *head, "peak, GiB"], rows))


def _ratio(row: Result, peer: Result | None, key: str) -> str:
    return "–" if peer is None else f"{row[key] / peer[key]:.2f}x"  # noqa: RUF001


def kernels_table(result: Result) -> str:
    """Share of a device copy's bandwidth first; the largest parameter, 5 % of it."""
    largest = max(row["numel"] for row in result["rows"])
    rows = []
    for row in result["rows"]:
        if (row["numel"], row.get("density")) == (largest, 0.05):
            cells = [f"{row['share_of_copy']:.2f}", f"{row['gb_per_s']:,.0f}", f"{row['ms']:.3f}"]
            rows.append([row["op"], str(row["block"]), *cells])
    return with_origin(result, grid(["kernel", "block", "share of copy", "GB/s", "ms"], rows))


def before_after_table(result: Result) -> str:
    """Ratios of two commits, measured in turn."""
    rows = []
    for row in result["rows"]:
        form = "{:.1%}" if "error" in row["what"] else "{:.1f}x" if "speed-up" in row["what"] else "{:.2f}x"
        rows.append([row["what"], form.format(row["before"]), form.format(row["after"])])
    return with_origin(result, grid(["", "before", "after"], rows))


def stream_table(result: Result) -> str:
    """One row per task, in the order in which they were learned."""
    rows = []
    for number, task in enumerate([*result["tasks"], result["again"]], 1):
        scores = [
            f"{task[key]:.1f}" if key in task else "" for key in ("learned", "final", "retrieved_percent")
        ]
        times = [f"{task[key]:.0f}" for key in ("wall_s", "processor_s")]
        sizes = [f"{task['peak_rss_bytes'] / 2**20:,.0f}", f"{task['bank_bytes'] / 2**20:.2f}"]
        rows.append([f"{number} {task['name']}", *scores, *times, *sizes])
    scores_head, times_head = ["learned, %", "at the end, %", "retrieved, %"], ["wall, s", "processor, s"]
    return with_origin(result, grid(["task", *scores_head, *times_head, "peak, MiB", "bank, MiB"], rows))


def later_table(result: Result) -> str:
    """One row per test set; of general sets the base's own answers are the right ones."""
    rows = []
    for name, score in result["scores_after"].items():
        answered, before = result["answered_by"].get(name, {}), result["scores_before"].get(name)
        own = answered.get(name, answered.get("base", 0)) / max(1, sum(answered.values()))
        shown = "" if before is None else f"{before:.1f}"
        rows.append([name, shown, f"{score:.1f}", f"{own:.1%}" if answered else ""])
    return with_origin(result, grid(["test set", "before, %", "after, %", "retrieved"], rows))


def checkpoint_table(result: Result) -> str:
    """Share of a step first."""
    rows = []
    for row in result["rows"]:
        for mode, called in (("waits", "waited for"), ("beside", "beside training")):
            found = row[mode]
            numbers = [f"{found['stall_steps']:.1%}", f"{found['stall_s']:.2f}", f"{found['lost_s']:.2f}"]
            size = f"{row['bytes'] / 2**20:,.0f}"
            rows.append([f"{row['name']}, {called}", *numbers, f"{row['step_s']:.2f}", size])
    head = ["checkpoint", "stall / step", "stall, s", "lost in all, s", "step, s", "MiB"]
    return with_origin(result, grid(head, rows))


def swaps_table(result: Result) -> str:
    """A delta's time over the others' first."""
    rows = [[row["name"], f"{row['ratio']:.2g}x", f"{1e3 * row['seconds']:.1f}"] for row in result["swaps"]]
    return with_origin(result, grid(["from task to task", "delta / this", "ms"], rows))


def sizes_table(result: Result) -> str:
    """Share of the time of loading first; the copy, which no swap can outdo, has no share."""
    rows = []
    for row in result["sizes"]:
        is_copy = row["density"] is None
        share = "" if is_copy else f"{row['share_of_loading']:.3f}x"
        cells = [share, f"{1e3 * row['seconds']:.2f}", f"{row['moved_bytes'] / 1e6:.1f}"]
        kept = "" if is_copy else f"{row['kept_bytes'] / 1e6:.1f}"
        name = "a copy of memory" if is_copy else f"{row['name']}, {row['density']:.1%}"
        rows.append([name, *cells, f"{row['gb_per_s']:.1f}", kept])
    head = ["mask, density", "swap / loading", "ms", "MB moved", "GB/s", "MB kept per task"]
    return with_origin(result, grid(head, rows))


def streams_table(result: Result) -> str:
    """Ratio to one merged model first."""
    rows = [[row["name"], f"{row['ratio']:.2f}x", f"{row['tokens_per_s']:.1f}"] for row in result["streams"]]
    return with_origin(result, grid(["prompts of", "throughput / merged model", "tokens/s"], rows))


def finding_table(result: Result) -> str:
    """Share of the pass over the prompt first."""
    rows = [
        [
            f"{row['tasks']:,}",
            f"{row['share']:.1%}",
            f"{1e3 * row['seconds']:.2f}",
            f"{1e3 * row['prefill_s']:.1f}",
            f"{row['signature_bytes'] / 2**20:.1f}",
            f"{row['grown_bytes'] / 2**20:.1f}",
        ]
        for row in result["retrieval"]
    ]
    head = ["tasks", "time / the prompt's pass", "ms", "the pass, ms", "signatures, MiB", "memory, MiB"]
    return with_origin(result, grid(head, rows))


STEP, SERVE = "bench_step.json", "bench_serve.json"
Sections = Mapping[str, tuple[tuple[str, ...], Callable[..., str]]]
SECTIONS: Sections = {
    "optimizer": (("bench_optimizer.json",), optimizer_table),
    "batches": ((STEP, "bench_step_2.json", "bench_step_1.json"), batch_table),
    "fused": (("bench_step_fused.json",), batch_table),
    "step": ((STEP,), step_table),
    "time": ((STEP,), time_table),
    "memory": (("bench_memory.json",), memory_table),
    "before_after": (("bench_before_after.json",), before_after_table),
    "checkpoint": (("bench_checkpoint.json",), checkpoint_table),
    "stream": (("stream20.json",), stream_table),
    "later": (("learn_later.json",), later_table),
    "swaps": ((SERVE,), swaps_table),
    "sizes": ((SERVE,), sizes_table),
    "streams": ((SERVE,), streams_table),
    "finding": ((SERVE,), finding_table),
    "gpu_optimizer": (("gpu_optimizer.json",), optimizer_table),
    "gpu_step": (("gpu_step_1b.json", "gpu_step_8b.json"), gpu_step_table),
    "gpu_kernels": (("gpu_kernels.json",), kernels_table),
}
"""Section of the document -> its result files and its table."""


def render(document: str, results: Path, sections: Sections = SECTIONS) -> str:
    """The document with every table made anew.

    Args:
        document: Markdown with the sections' markers.
        results: folder of the result files.
        sections: section -> its result files and its table.
    """
    for section, (files, table) in sections.items():
        document = insert(document, section, table(*(read_json(results / file) for file in files)))
    return document


if __name__ == "__main__":
    page = Path(sys.argv[2])
    write_text(page, render(page.read_text(encoding="utf-8"), Path(sys.argv[1])))
