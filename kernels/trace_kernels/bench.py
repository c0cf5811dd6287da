"""Times every op: ``python -m trace_kernels.bench --device cuda`` prints JSON.

On a GPU each row gives the achieved bandwidth beside that of a device copy of the same size; kernels are timed by the
device's own events with a flushed L2 cache (``triton.testing.do_bench``), on parameters far larger than that cache. On a CPU
the masked AdamW step is put beside torch's fused AdamW over *all* parameters, the step it replaces, timed in the same run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

OPS = ("compact", "masked_adamw", "masked_adamw_8bit", "delta_swap", "unit_reduce", "gap_gather", "bitmask")
WITHOUT_BLOCKS = {"gap_gather", "bitmask"}
"""Ops of single elements alone."""
BLOCKS = (1, 16, 64, 1024)
SIZES = {"cpu": (1 << 22,), "cuda": (1 << 26, 1 << 28)}
DENSITIES = {"cpu": (0.05,), "cuda": (0.01, 0.05, 0.2)}


def run_bench(
    device: str = "cpu",
    ops: Sequence[str] = OPS,
    sizes: Sequence[int] | None = None,
    densities: Sequence[float] | None = None,
) -> list[dict[str, Any]]:
    """Times ops on random supports in bf16 parameters.

    Args:
        device: ``cpu`` or ``cuda``.
        ops: modules of this package with a ``bench_case``, of `OPS`.
        sizes: elements of the parameter; None for `SIZES`.
        densities: masked share of it; None for `DENSITIES`.

    Returns:
        One row per case: op, numel, density, block, ms (median), gb_per_s; on a GPU also share_of_copy.
    """
    unknown = set(ops) - set(OPS)
    if unknown:
        raise ValueError(f"ops: {sorted(unknown)} unknown; must be of {', '.join(OPS)}")
    rows: list[dict[str, Any]] = []
    for numel in sizes or SIZES[device]:
        copy = _copy_row(numel, device)
        rows.append(copy)
        if device == "cpu":
            rows.append(_fused_adamw_row(numel))
        for density in densities or DENSITIES[device]:
            for op in ops:
                module = importlib.import_module(f".{op}", __package__)
                for block in (1,) if op in WITHOUT_BLOCKS else BLOCKS:
                    case = module.bench_case(numel, density, block, torch.bfloat16, device)
                    row = _row(op, numel, case.run, case.num_bytes, device) | {
                        "density": density,
                        "block": block,
                    }
                    if device != "cpu":
                        row["share_of_copy"] = row["gb_per_s"] / copy["gb_per_s"]
                    rows.append(row)
    return rows


def _row(op: str, numel: int, run: Callable[[], object], num_bytes: int, device: str) -> dict[str, Any]:
    ms = _median_ms(run, device)
    return {"op": op, "numel": numel, "ms": ms, "gb_per_s": num_bytes / ms / 1e6}


def _copy_row(numel: int, device: str) -> dict[str, Any]:
    source = torch.randn(numel, device=device)
    target = torch.empty_like(source)
    return _row("copy", numel, lambda: target.copy_(source), 2 * source.nbytes, device)


def _fused_adamw_row(numel: int) -> dict[str, Any]:
    weight = torch.nn.Parameter(torch.randn(numel))
    weight.grad = torch.randn(numel)
    optimizer = torch.optim.AdamW([weight], fused=True)
    return _row("torch_fused_adamw_dense_fp32", numel, optimizer.step, 7 * weight.nbytes, "cpu")


def _median_ms(run: Callable[[], object], device: str, num_runs: int = 9, num_warmup: int = 3) -> float:
    if device != "cpu":
        return triton.testing.do_bench(run, return_mode="median")
    times = []
    for _ in range(num_warmup + num_runs):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[num_warmup:])


def main() -> None:
    """Prints ``{"meta_info": ..., "rows": [...]}``."""
    parser = argparse.ArgumentParser(description="Time every kernel; prints JSON.")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda")
    )
    parser.add_argument("--ops", nargs="+", default=OPS, choices=OPS)
    parser.add_argument("--sizes", nargs="+", type=int, help="elements of the parameter")
    parser.add_argument("--densities", nargs="+", type=float, help="masked share, in (0, 1]")
    args = parser.parse_args()
    name = (
        torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    )
    meta = {"torch": torch.__version__, "triton": triton.__version__, "device": name}
    meta |= {"num_threads": torch.get_num_threads()}
    print(
        json.dumps(
            {"meta_info": meta, "rows": run_bench(args.device, args.ops, args.sizes, args.densities)},
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
