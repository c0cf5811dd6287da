"""A gradient that is NaN on one rank alone: every rank skips the same step, and knows whose it was."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from engine.resuming import CONFIG, PLAIN, STEPS, make_batches

from trace_dist.run_folder import RunFolder
from trace_dist.sharding import ShardedModel
from trace_dist.sharding.fsdp2 import Fsdp2Model
from trace_dist.sharding.zero3 import Zero3Model
from trace_dist.train.learner import MaskedLearner
from trace_dist.train.loop import train_steps
from trace_dist.train.metric_log import MetricLog
from trace_dist.utils import dist

BAD = 4
"""The step that goes wrong, by rank 1."""


def spoilt(out: Path) -> dict[str, Any]:
    """ZeRO-3 with clipping and FSDP2 without."""
    found = {}
    for backend, clips in (("zero3", True), ("fsdp2", False)):
        model = (
            Zero3Model(PLAIN.model(), PLAIN.threshold) if backend == "zero3" else Fsdp2Model(PLAIN.model())
        )
        found[backend] = _train(model, clips, RunFolder(out / f"spoilt-{backend}"))
    return found


def _train(model: ShardedModel, clips: bool, folder: RunFolder) -> dict[str, Any]:
    cfg = replace(CONFIG, max_grad_norm=1.0 if clips else None)
    learner, batches = MaskedLearner(model, PLAIN.mask(model), cfg), make_batches()
    values, whole = list[list[torch.Tensor]](), learner.backward

    def backward(loss: torch.Tensor) -> None:
        step = batches.state_dict()["examples_consumed"] // cfg.batch_size
        while len(values) < step:
            values.append([value.clone() for value in learner.values().values()])
        whole(loss * math.nan if step == BAD and dist.rank() == 1 else loss)

    learner.backward = backward  # type: ignore[method-assign]
    log = MetricLog(folder, "t", trackers=())
    result = train_steps(learner, batches, cfg, STEPS, description="spoilt", log=log)
    dist.barrier()
    lines = map(json.loads, folder.metrics.read_text().splitlines())
    model.close() if isinstance(model, Zero3Model) else None
    return {
        "skipped": result.skipped,
        "ranks": [line["ranks"] for line in lines if "ranks" in line],
        "kept": all(map(torch.equal, values[BAD], values[BAD - 1])),
        "went_on": not all(map(torch.equal, values[BAD + 1], values[BAD])),
    }
