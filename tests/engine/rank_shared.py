"""One rank's check of indices that are shared out, which on CPUs they are only here."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from engine.cases import CASES
from engine.rank_withheld import Parts, logged, trained
from engine.training import save_state, train
from torch import Tensor

from trace_dist import Mask, MaskedAdamW, shard
from trace_dist.sharding import compaction
from trace_dist.sharding.fsdp2 import Fsdp2Model
from trace_dist.sharding.index_shares import IndexShares
from trace_dist.sharding.zero3 import Zero3Model
from trace_dist.utils import dist

SHARED = ("element", "everything-accumulated-recomputed", "experts")
"""Cases of which the weights are compared with those of ranks that keep all indices."""


class Twice(Parts):
    """Its first block runs once more behind the last one, which then has been left."""

    def forward(self, x: Tensor, skip: bool) -> Tensor:
        return self.parts[2](super().forward(self.parts[2](x, skip), skip), skip)


def sharing() -> Any:
    """Inside the block indices are shared out, however few and wherever they lie."""
    return patch.object(compaction, "worth_sharing", lambda *_: True)


def shared(out: Path) -> dict[str, Any]:
    """Weights with shared indices; bytes; blocks that run twice; a gradient that one rank lacks."""
    found: dict[str, Any] = {"kept": _kept(), "twice": _twice()}
    with sharing():
        for name in SHARED:
            case = CASES[name]
            save_state(out / f"shared-zero3-{name}.safetensors", train(case, Zero3Model(case.model())).state)
            save_state(out / f"shared-fsdp2-{name}.safetensors", train(case, Fsdp2Model(case.model())).state)
        for backend in ("zero3", "fsdp2"):
            found[backend] = logged(*trained(backend, range(dist.rank(), dist.rank() + 1)))
    return found


def _kept() -> dict[str, int]:
    """Bytes of the indices of all ranks' entries, whole and shared out, and of those of this rank's own entries."""
    model = Zero3Model(CASES["element"].model(), 0)
    mask = CASES["element"].mask(model)
    optimizer = MaskedAdamW(model, mask)
    own = sum(support.runs.units.nbytes for support in optimizer.supports)
    sizes = {"own": own, "whole": _index_bytes(optimizer)}
    with sharing():
        return {**sizes, "shared": _index_bytes(MaskedAdamW(model, mask))}


def _index_bytes(optimizer: MaskedAdamW) -> int:
    return sum(tensor.nbytes for tensor in optimizer.model_states()["indices"])


def _twice() -> dict[str, Any]:
    """Two passes through a block that runs twice, with and without shared indices: gradients, and how many were late."""
    found: dict[str, Any] = {"late": []}
    late = IndexShares.late

    def counted(self: IndexShares, agreed: Any) -> Any:
        kept = list(late(self, agreed))
        found["late"].append(len(kept))
        return kept

    for name, sharer in (("whole", patch.object(IndexShares, "late", late)), ("shared", sharing())):
        model = shard(Twice(), "zero3")
        generator = torch.Generator().manual_seed(2)
        with sharer, patch.object(IndexShares, "late", counted):
            optimizer = MaskedAdamW(model, Mask.random(model, 0.5, "element", seed=3))
            for _ in range(2):
                x = torch.randn(3, 8, generator=generator)
                model.backward((model(x, skip=False) - 1).square().mean())
        found[name] = [support.grad.tolist() for support in optimizer.supports]
    return found
