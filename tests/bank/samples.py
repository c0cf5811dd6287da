"""Small models, deltas and signatures for the tests of the bank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from engine.cases import CASES
from torch import Tensor

from trace_dist import Delta, Mask, shard
from trace_dist.bank.signature import Signature, fit_signature
from trace_dist.sharding import ShardedModel

DTYPES = {"float32": (torch.float32, torch.int32), "bfloat16": (torch.bfloat16, torch.int16)}


def base_model(dtype: str = "float32", family: str = "llama") -> ShardedModel:
    return shard(replace(CASES["element"], dtype=dtype, family=family).model(), "single")


def make_delta(model: ShardedModel, task: str = "tuned", seed: int = 0, **options: Any) -> Delta:
    """Random tuned values at a random mask; special values among them."""
    options = {"density": 0.05, "granularity": "element", "maskable": "all"} | options
    mask = Mask.random(model, seed=seed, **options).with_meta(task=task)
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name in mask:
        tuned = torch.randn(len(mask.elements(name)), generator=generator)
        tuned[0], tuned[-1] = -0.0, 1e-30
        values[name] = tuned.to(model.local(name).dtype)
    return Delta(mask, values, task)


def bits(state: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    return {name: value.view(DTYPES[dtype][1]) for name, value in state.items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor], dtype: str) -> bool:
    mine, theirs = bits(one, dtype), bits(other, dtype)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def signature(task: str, seed: int) -> Signature:
    generator = torch.Generator().manual_seed(seed)
    return fit_signature(torch.randn(64, 8, generator=generator) + 10 * seed, 2, 0, task)
