"""Masked training that looks at validation examples, with packed rows: on any backend and number of ranks."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from engine.resuming import CONFIG, PLAIN, STEPS, make_batches

from trace_dist.bank.delta import extract_delta
from trace_dist.data.batches import Batches
from trace_dist.sharding import ShardedModel
from trace_dist.sharding.fsdp2 import Fsdp2Model
from trace_dist.sharding.zero3 import Zero3Model
from trace_dist.train.task import train_mask
from trace_dist.train.validation import Validation
from trace_dist.utils import dist

SCORES = {2: 10.0, 4: 60.0, 6: 59.0, 8: 50.0, 9: 40.0}
"""What the metric is made to say; the best look is that of step 4."""


def look(model: ShardedModel, folder: Path | None, scores: dict[int, float] = SCORES) -> dict[str, Any]:
    """Train to the end from what ``folder`` holds; JSON-ready, and the delta that is left."""
    mask, seen, said = PLAIN.mask(model), {}, iter(scores.items())

    def score() -> float:
        step, value = next(said)
        seen[step] = extract_delta(model, mask, "t").values
        return value

    batches = make_batches()
    batches.wants_packing = True
    rows = batches._datasets[0].select(range(5))
    examples = next(Batches(rows, batch_size=5, micro_batch_size=2, seed=0, pad_id=0))
    result, _ = train_mask(
        model,
        mask,
        batches,
        replace(CONFIG, eval_every=2, eval_by="metric"),
        STEPS,
        description="t",
        checkpoints=folder,
        validation=Validation(examples, score),
    )
    left = extract_delta(model, mask, "t")
    same = 4 in seen and all(torch.equal(seen[4][name], value) for name, value in left.values.items())
    return {
        "losses": [loss for _, loss in result.losses],
        "looks": [[look.step, look.loss] for look in result.looks],
        "kept": result.kept_step,
        "is that of the look": same,
        "packed": batches._layout is not None,
        "left": left,
    }


def looking(out: Path) -> dict[str, Any]:
    """One rank's: both backends; and ZeRO-3 that is cut after step 6 and goes on."""
    found = {
        "zero3": look(Zero3Model(PLAIN.model(), PLAIN.threshold), out / "looking"),
        "fsdp2": look(Fsdp2Model(PLAIN.model()), None),
    }
    if dist.is_main():
        shutil.rmtree(out / "looking" / f"step-{STEPS:08d}")
        shutil.copytree(out / "looking", out / "looking-cut")
        found["zero3"]["left"].save(out / "looking.safetensors")
    dist.barrier()
    again = look(Zero3Model(PLAIN.model(), PLAIN.threshold), out / "looking", {8: 50.0, 9: 40.0})
    left = found["zero3"]["left"].values
    again["is that of the look"] = all(torch.equal(left[name], v) for name, v in again["left"].values.items())
    found["continued"] = again
    return {name: {k: v for k, v in each.items() if k != "left"} for name, each in found.items()}
