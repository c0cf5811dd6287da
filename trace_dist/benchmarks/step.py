"""A training step from end to end under ZeRO-3: time, peak memory, bytes on the wire, and where the time goes.

    trace-dist bench step --ranks 2 --out docs/results/bench_step.json

Every contestant runs in processes of its own, all of them in turn, several rounds; the medians are over all rounds, so that a
machine that slows down slows all of them down.
"""

from __future__ import annotations

import resource
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from trace_dist.benchmarks.contestants import CONTESTANTS, FOR_GPUS, Contestant, Race, build
from trace_dist.benchmarks.jobs import run_job, run_rank
from trace_dist.benchmarks.timing import median_of, now
from trace_dist.launching import ProcessFailed
from trace_dist.profiling.wire import WireCounter
from trace_dist.utils import dist
from trace_dist.utils.env import made_alike, meta_info, run_info
from trace_dist.utils.files import read_json, write_json
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)

WARM_UP = 2
PHASES = ("forward", "backward", "optimizer")
BYTES = ("peak_rss_bytes", "peak_device_bytes", "gradient_bytes_sent", "weight_bytes_sent")
KINDS: dict[str, tuple[str, ...]] = {
    "matmul": ("aten::mm", "aten::addmm", "aten::bmm", "aten::_addmm"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "collectives": ("c10d::", "gloo:", "record_param_comms"),
    "copies": ("aten::copy_", "aten::cat", "aten::fill_", "aten::index", "aten::clone"),
    "optimizer": ("Optimizer.", "aten::_fused_adamw", "masked_adamw"),
}
"""Where time goes: kind -> beginnings or parts of operator names; the rest of the operators is ``other operators``."""


def race_in_turn(
    race: Race, names: Sequence[str], num_ranks: int, rounds: int, steps: int, out: Path | None
) -> dict[str, Any]:
    """Run some contestants and write the result; what a file at ``out`` already holds is kept, so a cut run continues, where the
    same commit measured it on the same hardware.

    Args:
        race: model and batch.
        names: of ``CONTESTANTS`` and ``FOR_GPUS``.
        num_ranks: ranks of each, one thread each.
        rounds: how often each contestant is started.
        steps: steps timed per start.
        out: JSON file.

    Raises:
        ValueError: a contestant is unknown.
    """
    known = (*CONTESTANTS, *FOR_GPUS)
    for name in names:
        if name not in known:
            raise ValueError(f"contestants: {name!r} is unknown; use some of {', '.join(known)}")
    settings = {**asdict(race), "num_ranks": num_ranks, "steps": steps}
    kept = read_json(out) if out is not None and out.is_file() else {}
    if kept and not (kept.get("settings") == settings and made_alike(kept)):
        logger.warning("%s: other settings, code or hardware; all is measured anew", out)
        kept = {}
    runs: dict[str, list[dict[str, Any]]] = kept.get("runs", {})
    result: dict[str, Any] = {}
    for round_number in range(rounds):
        for name in names:
            if len(runs.setdefault(name, [])) > round_number:
                continue
            logger.info("round %d of %d: %s", round_number + 1, rounds, name)
            runs[name].append(_run(race, name, num_ranks, steps))
            rows = [_summary(n, found, runs.get("full", [])) for n, found in runs.items() if found]
            info = {"run_info": run_info(), "meta_info": meta_info()}
            result = {**info, "settings": settings, "rows": rows, "runs": runs}
            if out is not None:
                write_json(out, result)
    return result or kept


def _run(race: Race, name: str, num_ranks: int, steps: int) -> dict[str, Any]:
    """One contestant on fresh ranks; ``error`` where it cannot run here."""
    try:
        return run_job(__name__, {"race": asdict(race), "name": name, "steps": steps}, num_ranks)
    except ProcessFailed as error:
        cause = str(error).splitlines()[0]
        logger.warning("%s did not run: %s", name, cause)
        return {"error": cause}


def _summary(name: str, runs: Sequence[dict[str, Any]], full: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of a contestant over all of its runs; ratios to full fine-tuning."""
    whole = [run for run in runs if "error" not in run]
    if not whole:
        return {"name": name, "error": runs[0]["error"]}
    row: dict[str, Any] = {"name": name, "num_trained": whole[0]["num_trained"]}
    row["step_s"] = median_of(whole, "step_s")
    row["phases_s"] = {phase: median_of(whole, f"{phase}_s") for phase in PHASES}
    for key in filter(whole[0].__contains__, BYTES):
        row[key] = statistics.median(run[key] for run in whole)
    row["time_s"] = {
        kind: statistics.median(run["time_s"][kind] for run in whole) for kind in whole[0]["time_s"]
    }
    dense = [run for run in full if "error" not in run]
    if dense:
        row["step_ratio"] = row["step_s"] / median_of(dense, "step_s")
        if dense[0]["gradient_bytes_sent"]:  # a rank that is alone sends none
            row["gradient_bytes_ratio"] = row["gradient_bytes_sent"] / dense[0]["gradient_bytes_sent"]
        row["peak_rss_ratio"] = row["peak_rss_bytes"] / statistics.median(
            run["peak_rss_bytes"] for run in dense
        )
    return row


def measure(contestant: Contestant, steps: int) -> dict[str, Any]:
    """Time some steps on this rank, then count one and profile one."""
    times: dict[str, list[float]] = {f"{phase}_s": [] for phase in (*PHASES, "step")}
    for index in range(WARM_UP + steps):
        dist.barrier()
        marks = [now()]
        loss = contestant.forward()
        marks.append(now())
        contestant.backward(loss)
        marks.append(now())
        contestant.step()
        marks.append(now())
        if index >= WARM_UP:
            for phase, begin, end in zip(PHASES, marks, marks[1:], strict=False):
                times[f"{phase}_s"].append(end - begin)
            times["step_s"].append(marks[-1] - marks[0])
    peaks = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    on_gpu = dist.local_device().type == "cuda"
    if on_gpu:
        peaks["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    with WireCounter() as wire:
        contestant.once()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiled:
        begin = now()
        contestant.once()
        wall = now() - begin
    return {
        **times,
        "num_trained": contestant.num_trained,
        **{name: dist.max_over_ranks(peak) for name, peak in peaks.items()},
        "gradient_bytes_sent": wire.reduced,
        "weight_bytes_sent": wire.gathered,
        "time_s": _time_by_kind(profiled, wall, on_gpu),
    }


def _time_by_kind(profiled: Any, wall: float, on_gpu: bool) -> dict[str, float]:
    """Self time of operators by kind, on the GPU where they run there; what no operator accounts for is Python."""
    spent = dict.fromkeys((*KINDS, "other operators"), 0.0)
    for event in profiled.key_averages():
        kind = next(
            (k for k, parts in KINDS.items() if any(part in event.key for part in parts)), "other operators"
        )
        spent[kind] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
    return spent | {"Python and waiting": max(0.0, wall - sum(spent.values()))}


if __name__ == "__main__":
    run_rank(lambda asked: measure(build(asked["name"], Race(**asked["race"])), asked["steps"]))
