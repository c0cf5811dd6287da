"""A toy network for what transformers do not show: a layer that runs twice in a forward, one that is left out at times."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trace_dist import Mask, MaskedAdamW, shard
from trace_dist.sharding.zero3 import Zero3Model
from trace_dist.utils import dist

WIDTH, STEPS = 7, 5


class Toy(nn.Module):
    """first -> shared -> shared again -> optional -> last, all [WIDTH, WIDTH] with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.shared, self.optional, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        h = torch.tanh(self.first(x))
        h = torch.tanh(self.shared(torch.tanh(self.shared(h))))
        if not skip:
            h = h + self.optional(h)
        return self.last(h)


def toy_inputs(num_ranks: int) -> list[list[Tensor]]:
    """Inputs [3, WIDTH] by step and rank."""
    generator = torch.Generator().manual_seed(2)
    return [[torch.randn(3, WIDTH, generator=generator) for _ in range(num_ranks)] for _ in range(STEPS)]


def toy_loss(out: Tensor) -> Tensor:
    return F.mse_loss(out, torch.ones_like(out))


def skips(step: int) -> bool:
    """Whether the optional layer is left out: its gradient is then missing, as that of an unused expert. ZeRO-3 wants the
    same layers in the same order on every rank, so all ranks leave it out (``reduction`` in ranks.py tries less)."""
    return step in (1, 3)


def train_toy(granularity: str) -> dict[str, list[float]]:
    """Masked training on this job's ranks; the weights afterwards, on rank 0."""
    model = Zero3Model(Toy(), persistence_threshold=0)
    mask = Mask.random(model, 0.5, granularity, seed=3, maskable="all")
    optimizer = MaskedAdamW(model, mask, lr=1e-2, eps=1e-5)
    rank, num_ranks = dist.rank(), dist.world_size()
    for step, inputs in enumerate(toy_inputs(num_ranks)):
        model.backward(toy_loss(model(inputs[rank].to(model.device), skip=skips(step))))
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.flatten().tolist() for name, value in model.full_state_dict().items()}


def train_toy_in_one_process(granularity: str, num_ranks: int) -> dict[str, Tensor]:
    """The same, with each rank's batch in turn."""
    model = shard(Toy(), "single")
    mask = Mask.random(model, 0.5, granularity, seed=3, maskable="all")
    optimizer = MaskedAdamW(model, mask, lr=1e-2, eps=1e-5)
    for step, inputs in enumerate(toy_inputs(num_ranks)):
        for x in inputs:
            model.backward(toy_loss(model(x.to(model.device), skip=skips(step))) / num_ranks)
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.flatten() for name, value in model.full_state_dict().items()}
