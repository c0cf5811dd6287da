"""What a training step asks of a GPU, counted without one (``meta_gpu``): ZeRO-3 on 8 ranks, of which this is the first.

python rank_meta.py <out folder>
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from engine.cases import CASES, Case
from engine.meta_gpu import META, Count, ManyRanks, meta_gpu, meta_zero3
from torch import Tensor

from trace_dist import Mask
from trace_dist.bank.delta import applied, extract_delta
from trace_dist.config import TrainConfig
from trace_dist.data.batches import Step, collate
from trace_dist.sharding.base import ShardedModel
from trace_dist.sharding.single import ReplicatedModel
from trace_dist.train.learner import MaskedLearner
from trace_dist.train.loop import _reduce

WORLD, MANY = 8, 64
CASE = replace(CASES["element"], dtype="bfloat16")
MASKS = {
    "element": ("element", 1),
    "block": ("block", 3),
    "block, cut short": ("block", 12),
    "row": ("row", 1),
    "column": ("column", 1),
}
"""Granularity, and elements of a block: of rows of 36 and 51 elements, which 12 does not divide."""
EXCHANGE = ("trace_dist.masks", "trace_dist.sharding.re", "trace_dist.sharding.support", "trace_kernels")
"""Modules between a layer's gradient and the compact buffer."""
Shard = Callable[[Any], ShardedModel]


def step_of(num_micro: int) -> Step:
    """A step of micro-batches with padding."""
    rows = [
        {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4]},
        {"input_ids": [1, 2], "labels": [-100, 2]},
    ]
    return Step([collate(rows, 0) for _ in range(num_micro)], 4 * num_micro)


def counted(kind: str, shard: Shard, case: Case = CASE) -> dict[str, Any]:
    """Waits and launches of attaching a mask, a micro-batch, a step, and the swap of a delta."""
    module = case.model()
    granularity, block = MASKS[kind]
    mask = Mask.random(module, case.density, granularity, seed=1, block=block)
    delta = extract_delta(ReplicatedModel(module), mask, "task")
    count = Count()
    model = shard(module.to(META))
    with count:
        learner = MaskedLearner(model, mask, TrainConfig(), lr=1e-3)
    found: dict[str, Any] = {"parameters": len(mask), "attach": sum(count.waits.values())}
    for _ in range(2):  # the first step lays out tables, and DeepSpeed learns the order of modules
        count.clear()
        with count:
            loss = learner.accumulate(step_of(2))
        found["micro-batch"] = {
            "ours": count.waited("trace_") / 2,
            "libraries": sum(count.waits.values()) / 2 - count.waited("trace_") / 2,
            "launches": count.launched(*EXCHANGE) / 2 / len(mask),
        }
        count.clear()
        with count:
            _reduce(loss, False, False)
            learner.step()
        found["step"] = {
            "waits": sum(count.waits.values()),
            "adamw": count.launched("trace_kernels.adamw_batch"),
            "launches": count.launched("trace_dist.optim", "trace_dist.sharding.compaction", "trace_kernels"),
        }
    found["computed"] = [len(lines) for lines in computed_lines(learner)]
    count.clear()
    with count:
        learner.optimizer.set_values([torch.empty(s.runs.num_entries) for s in learner.optimizer.supports])
    found["resume"] = sum(count.waits.values())
    model.detach()
    count.clear()
    with count, applied(model, delta):
        pass
    found["swap"] = sum(count.waits.values())
    found["swap launches"] = count.launched("trace_kernels.delta_swap")
    return found


def computed_lines(learner: MaskedLearner) -> list[Tensor]:
    """The rows or columns that are computed of each weight, where a mask is made of them."""
    parts = [support.part for support in learner.optimizer.supports]
    return [lines for part in parts for lines in (part.rows, part.columns) if lines is not None]


def left_whole(shard: Shard) -> int:
    """Parameters that are whole when ``deepspeed.initialize``, which would move all of them to the GPU, is called."""
    import deepspeed

    found, initialize = [], deepspeed.initialize

    def watched(model: Any, **options: Any) -> Any:
        found.append(sum(parameter.numel() > 0 for parameter in model.parameters()))
        return initialize(model=model, **options)

    with patch.object(deepspeed, "initialize", watched):
        shard(CASE.model().to(META))
    return found[0]


def main(out: Path) -> None:
    with meta_gpu():
        replicated = counted("element", lambda module: ManyRanks(module, WORLD))
        with meta_zero3(WORLD) as shard:
            found = {kind: counted(kind, shard) for kind in MASKS}
            deep = counted("row", shard, replace(CASE, num_layers=6 * CASE.num_layers))
            left = left_whole(shard)
        with meta_zero3(MANY) as shard:
            many = {kind: counted(kind, shard) for kind in ("element", "row")}
    report = {"zero3": found, "many": many, "deep": deep, "replicated": replicated, "left whole": left}
    (out / "found.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
