"""Small models, deltas, signatures and banks of every age for the tests of the bank."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from engine.cases import CASES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from trace_dist import Delta, DeltaBank, Mask, shard
from trace_dist.bank.delta import applied
from trace_dist.bank.representation import represent
from trace_dist.bank.signature import Signature, fit_signature
from trace_dist.masks import UnitLayout
from trace_dist.sharding import ShardedModel

DTYPES = {"float32": (torch.float32, torch.int32), "bfloat16": (torch.bfloat16, torch.int16)}


def base_model(dtype: str = "float32", family: str = "llama", backend: str = "single") -> ShardedModel:
    return shard(replace(CASES["element"], dtype=dtype, family=family).model(), backend)


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


def drawn(task: str, seed: int, dim: int = 8) -> Signature:
    """A signature of random numbers, made faster than one is fitted."""
    x = torch.randn(14, dim, generator=torch.Generator().manual_seed(seed))
    return Signature(task, x[:2] + 10 * seed, torch.tensor([6, 7]), x[2:9], x[9:] + 10 * seed)


def small_delta(task: str, seed: int, **meta: Any) -> Delta:
    """A delta of 100 entries of one made-up matrix."""
    generator = torch.Generator().manual_seed(seed)
    units = torch.randperm(1000, generator=generator)[:100].sort().values.to(torch.int32)
    mask = Mask(
        {"w": units}, {"w": UnitLayout((20, 50), 1)}, "element", {"model": "aaaa", "task": task, **meta}
    )
    return Delta(mask, {"w": torch.randn(100, generator=generator)}, task)


def same_delta(one: Delta | None, other: Delta | None) -> bool:
    """Whether two deltas select the same and hold the same bits."""
    if one is None or other is None:
        return one is other
    return one.mask == other.mask and same_bits(dict(one.values), dict(other.values), "float32")


def prompts_of(task: int, num: int, seed: int = 0) -> list[list[int]]:
    """Token ids of a task's prompts: each task has four tokens of its own."""
    generator = torch.Generator().manual_seed(100 * seed + task)
    common = torch.randint(20, 40, (num, 9), generator=generator)
    own = torch.randint(4 * task, 4 * task + 4, (num, 9), generator=generator)
    kept = torch.rand(num, 9, generator=generator) < 0.7
    return torch.where(kept, own, common).tolist()


def represent_rows(model: ShardedModel, prompts: list[list[int]]) -> Callable[[Sequence[int]], Tensor]:
    """Rows -> their representations under the model as it is then."""

    def run(rows: Sequence[int]) -> Tensor:
        return represent(model.module, [prompts[row] for row in rows], layer=1, batch_size=8, pad_id=0)

    return run


def adapted_bank(folder: Path, model: ShardedModel, num_tasks: int) -> DeltaBank:
    """A bank of random deltas, with signatures under the base and under each task's own weights. Collective."""
    bank = DeltaBank.create(folder, "aaaa", layer=1)
    for task in range(num_tasks):
        delta = make_delta(model, f"t{task}", task)
        prompts = prompts_of(task, 32)
        run = represent_rows(model, prompts)
        every = range(len(prompts))
        before = fit_signature(run(every), 1, 0, delta.task)
        with applied(model, delta):
            after = fit_signature(run(every), 1, 0, delta.task)
        bank.add(before, delta, adapted=after)
    return bank


def write_old_bank(folder: Path, tasks: Sequence[tuple[Signature, Delta | None]]) -> None:
    """A bank of version 1, written as its release did."""
    (folder / "deltas").mkdir(parents=True)
    about = {"format": "trace_dist.bank", "version": 1, "base": "aaaa", "layer": 1}
    (folder / "bank.json").write_text(json.dumps(about))
    tensors = {}
    for index, (signature, delta) in enumerate(tasks):
        for name in ("means", "counts", "factor", "heldout"):
            tensors[f"{index}.{name}"] = getattr(signature, name).contiguous()
        if delta is not None:
            path = folder / "deltas" / f"{delta.task}.safetensors"
            delta.save(path)
            with safe_open(str(path), "pt") as file:
                header = json.loads(file.metadata()["header"])
            for key in ("digest", "header_checksum"):
                del header[key]
            save_file(load_file(path), str(path), {"header": json.dumps(header)})
    names = [signature.task for signature, _ in tasks]
    header = {"base": "aaaa", "format": "trace_dist.signatures", "version": 1, "tasks": names}
    save_file(tensors, str(folder / "signatures.safetensors"), {"header": json.dumps(header)})
