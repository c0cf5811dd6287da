"""One rank's check of what ZeRO-3 keeps gathered between forward and backward, for the estimate that foresees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from engine.cases import CASES, Case, batches

from trace_dist import Mask
from trace_dist.models import blocks
from trace_dist.sharding import zero3

DISTANCES = (1, 10_000, 20_000, 40_000, 10**6)
"""Of reuse, in elements; a block has some 10,000."""
KEPT = {name: replace(CASES[name], num_layers=3) for name in ("element", "qwen2-biases")}
"""With tied and with untied embeddings."""


def gathering(out: Path) -> dict[str, list[int]]:
    """``case-whole`` -> elements gathered, by distance; ``whole``: blocks are gathered whole."""
    found = {}
    for whole in (True, False):
        with patch.object(blocks, "WHOLE_BLOCK_ELEMENTS", 10**6 * whole):
            for name, case in KEPT.items():
                found[f"{name}-{whole}"] = [kept(case, distance) for distance in DISTANCES]
    return found


def limited(distance: int, original: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The configuration without prefetching, which in so small a model would find every parameter."""
    config = original(*arguments)
    config["zero_optimization"] |= {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": distance}
    return config


def kept(case: Case, distance: int) -> int:
    """Elements gathered between forward and backward in the third step, when DeepSpeed knows the order of modules."""
    with patch.object(zero3, "zero3_config", partial(limited, distance, zero3.zero3_config)):
        model = zero3.Zero3Model(case.model(), persistence_threshold=0)
    model.attach(Mask.random(model, 0.3, "element"))
    first, second, third = (ids for ids, _ in batches(case)[:3])
    for ids in (first, second):
        model.backward(model(input_ids=ids, labels=ids).loss)
    model(input_ids=third, labels=third)
    gathered = sum(copy.numel() for copy in model.copies())
    model.close()
    return gathered
