"""The optimizer step alone: MaskedAdamW beside DeepSpeedCPUAdam and torch's fused AdamW over all parameters.

    trace-dist bench optimizer --out docs/results/bench_optimizer.json

One thread, no clipping, fp32 moments, all optimizers in turn, several rounds, all on one device: this rank's GPU, where
DeepSpeedCPUAdam cannot run, or the CPU. Twice: with fp32 weights, and with bf16 weights and
an fp32 master, where every optimizer writes the weights back from the master it updates, as a training step does.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trace_dist.benchmarks.peers import cpu_adam
from trace_dist.benchmarks.timing import now
from trace_dist.masks.ops import layouts_for, random_mask
from trace_dist.optim.masked_adamw import MaskedAdamW
from trace_dist.sharding.single import SingleModel
from trace_dist.utils import dist
from trace_dist.utils.env import meta_info, run_info
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)

WIDTH, NUM_LAYERS = 2048, 24
MASKS = {"element": ("element", 1), "block 64": ("block", 64), "row": ("row", 1)}
PEERS = ("DeepSpeedCPUAdam", "torch fused AdamW")
ON_GPU = ("torch fused AdamW",)
"""Those of the peers that run on a GPU."""


class Layers(nn.Module):
    """A stack of square linear layers: 100.7 M parameters."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.config: Any = None
        self.layers = nn.ModuleList(
            nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in range(NUM_LAYERS)
        )


def race_optimizers(density: float, rounds: int) -> dict[str, Any]:
    """Time every optimizer's step.

    Args:
        density: masked share.
        rounds: steps timed of each; the median counts.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [row for dtype in (torch.bfloat16, torch.float32) for row in _race(dtype, density, rounds)]
    finally:
        torch.set_num_threads(threads)
    return {
        "run_info": run_info(),
        "meta_info": meta_info(),
        "settings": {
            "num_parameters": NUM_LAYERS * WIDTH**2,
            "density": density,
            "rounds": rounds,
            "threads": 1,
        },
        "rows": rows,
    }


def _race(dtype: torch.dtype, density: float, rounds: int) -> list[dict[str, Any]]:
    """One row per optimizer, on weights of one dtype."""
    peers = [name for name in PEERS if name in ON_GPU or dist.local_device().type == "cpu"]
    steps = {name: _masked_step(name, density, dtype) for name in MASKS}
    steps |= {name: _peer_step(name, dtype) for name in peers}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(rounds + 1):
        for name, step in steps.items():
            begin = now()
            step()
            if round_number:  # the first is a warm-up
                times[name].append(1e3 * (now() - begin))
    medians = {name: statistics.median(found) for name, found in times.items()}
    fastest = min(medians[name] for name in peers)
    weights = str(dtype).removeprefix("torch.")
    rows = [
        {"name": name, "weights": weights, "step_ms": ms, "speedup": fastest / ms}
        for name, ms in medians.items()
    ]
    for row in rows:
        logger.info("%s, %s: %.1f ms, %.1fx", row["name"], weights, row["step_ms"], row["speedup"])
    return rows


def _masked_step(name: str, density: float, dtype: torch.dtype) -> Callable[[], object]:
    granularity, block = MASKS[name]
    model = SingleModel(Layers(dtype))
    layouts = layouts_for(model, granularity, block, "all")
    optimizer = MaskedAdamW(model, random_mask(layouts, granularity, density, seed=0), lr=1e-4)
    for support in optimizer.supports:
        support.grad.normal_(std=1e-3)
        support.reached = True
    return optimizer.step


def _peer_step(name: str, dtype: torch.dtype) -> Callable[[], object]:
    masters = list(Layers(torch.float32).to(dist.local_device()).parameters())
    for master in masters:
        master.grad = torch.randn_like(master).mul_(1e-3)
    fused = name == "torch fused AdamW"
    optimizer = torch.optim.AdamW(masters, lr=1e-4, fused=True) if fused else cpu_adam(masters, lr=1e-4)
    if dtype == torch.float32:
        return optimizer.step
    weights = [torch.empty_like(master, dtype=dtype) for master in masters]

    def step() -> None:
        optimizer.step()
        for weight, master in zip(weights, masters, strict=True):
            weight.copy_(master.data)

    return step
